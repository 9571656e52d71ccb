"""Tiny language models of `transformers` with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vlm.models.blip2_llm import Blip2Llm, Blip2LlmConfig, LlmConfig
from vlm.models.llm import LanguageModel
from vlm.models.qformer import QFormerConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig

SPOKEN = "<pad> <s> </s> <unk> a red green blue black box number Question : Answer what colour is it ? the seen here"
WORDS, WIDTH, START, END = 60, 32, 1, 2
"""Vocabulary, width, and the ids of the tokens that texts begin and end with."""
COMMON: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}


def inner(kind: str, seed: int = 0) -> nn.Module:
    """A causal `llama` or `opt`, or a seq2seq `t5`, whose every tensor is random and large enough to matter."""
    torch.manual_seed(seed)
    made: Any
    if kind == "llama":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = LlamaForCausalLM(LlamaConfig(**COMMON, **sizes, num_key_value_heads=2, max_position_embeddings=64))
    elif kind == "opt":
        sizes = {"hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = OPTForCausalLM(OPTConfig(**COMMON, **sizes, word_embed_proj_dim=WIDTH, max_position_embeddings=64))
    else:
        sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        made = T5ForConditionalGeneration(T5Config(**COMMON, **sizes, decoder_start_token_id=START))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


FIRST = " with its start first"


def language_model(kind: str, seed: int = 0) -> LanguageModel:
    """The same behind our interface; with `FIRST` at the end of its kind, it reads the start before the image."""
    model = LanguageModel(inner(kind.removesuffix(FIRST), seed), end_id=END)
    model.start_first = kind.endswith(FIRST)
    return model


def visual_prompt(rows: int, seed: int = 1) -> Tensor:
    """(B, 3, D)."""
    return torch.randn(rows, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], seed: int = 2) -> tuple[Tensor, Tensor]:
    """Ids (B, L), start token first and padded behind, and their mask."""
    width = max(lengths)
    ids = torch.randint(3, WORDS, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = START
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def llm_folder(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A language model on disk as `transformers` writes it, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made: Any = inner(kind, seed)
    made.save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(SPOKEN.split())}
    vocabulary |= {str(number): len(vocabulary) + number for number in range(WORDS - len(vocabulary))}
    engine = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(engine.to_str())
    return folder


IMAGE = ViTConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_width=64)
QUERIES = TransformerConfig(vocab_size=0, width=16, layers=2, heads=2, mlp_width=32, cross_layers=(0,), cross_width=32)


def stage(kind: str = "llama", seed: int = 0, **settings: Any) -> Blip2Llm:
    """A stage-2 BLIP-2 with its language model, every tensor random and large enough to matter; kind: see above."""
    qformer = QFormerConfig(text=QUERIES, queries=3, speaks=False)
    llm = LlmConfig(width=WIDTH, start_first=kind.endswith(FIRST))
    config = Blip2LlmConfig(image=IMAGE, qformer=qformer, llm=llm, **settings)
    torch.manual_seed(seed)
    network = Blip2Llm(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    network.attach(language_model(kind, seed))
    return network
