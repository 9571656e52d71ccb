"""BLIP-2 of other libraries' parts: transformers' image encoder and Q-Former, and LAVIS's names for what they hold."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.weights.made import scrambled

SIZES = {"image_size": 24, "image": 176, "text": 128, "layers": 3, "queries": 4, "space": 24}
POSITIONS, WORDS, DEC = 20, 30523, 30522
FINAL_EPS = 1e-5


def settings(**qformer: Any) -> dict[str, Any]:
    """For Blip2Config; its LLM is as small as can be."""
    return {
        "vision_config": {
            "hidden_size": SIZES["image"], "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": SIZES["image_size"], "patch_size": 8, "layer_norm_eps": 1e-6,
        },
        "qformer_config": {
            "hidden_size": SIZES["text"], "num_hidden_layers": SIZES["layers"], "num_attention_heads": 2,
            "intermediate_size": 160, "vocab_size": WORDS, "max_position_embeddings": POSITIONS,
            "use_qformer_text_input": True,
        } | qformer,
        "text_config": {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "ffn_dim": 16, "vocab_size": 40, "word_embed_proj_dim": 16},
        "num_query_tokens": SIZES["queries"], "image_text_hidden_size": SIZES["space"],
    }  # fmt: skip


def gains(model: nn.Module) -> nn.Module:
    """Norms that keep what they get, so that rows stay apart behind several of them."""
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if re.search(r"([nN]orm\d?|layer_?norm\d?)\.weight$", name):
                gain.copy_(1 + (gain - gain.mean()))
    return model


def matcher(seed: int = 0, **qformer: Any) -> Any:
    """A random Blip2ForImageTextRetrieval, whose queries differ."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    model: Any = gains(scrambled(Blip2ForImageTextRetrieval(Blip2Config(**settings(**qformer))), seed))
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn(model.query_tokens.shape, generator=torch.Generator().manual_seed(seed)))
    return model


class Reference(nn.Module):
    """Stage 1 as LAVIS has it: the norm behind the image encoder has an eps of its own, and words can be said."""

    def __init__(self, seed: int = 0) -> None:
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLMPredictionHead

        super().__init__()
        self.inner = matcher(seed)
        self.inner.vision_model.post_layernorm.eps = FINAL_EPS
        for layer in self.inner.vision_model.encoder.layers:  # LAVIS has no bias on keys
            width = SIZES["image"]
            layer.self_attn.qkv.bias.data[width : 2 * width] = 0
        head = BertLMPredictionHead(BertConfig(hidden_size=SIZES["text"], vocab_size=WORDS))
        self.head: Any = gains(scrambled(head, seed + 1))
        self.head.decoder.weight = self.inner.embeddings.word_embeddings.weight
        self.head.decoder.bias = self.head.bias
        self.temp = 0.05
        self.eval()

    @torch.no_grad()
    def image_states(self, pixels: Tensor) -> Tensor:
        """(B, N, D)."""
        return self.inner.vision_model(pixel_values=pixels).last_hidden_state

    @torch.no_grad()
    def said(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, L, V), a word seeing the queries and the words before it, and queries no words."""
        queries, length = SIZES["queries"], ids.shape[1]
        seen = torch.ones(len(ids), queries + length, queries + length, dtype=torch.bool).tril()
        seen[:, :queries, :queries] = True
        seen = seen & torch.cat([torch.ones(len(ids), queries, dtype=torch.bool), mask.bool()], dim=1)[:, None]
        states = self.inner.query_tokens.expand(len(ids), -1, -1)
        states = self.inner.qformer(
            query_embeds=self.inner.embeddings(input_ids=ids, query_embeds=states),
            query_length=queries,
            attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None],
            encoder_hidden_states=self.image_states(pixels),
        ).last_hidden_state
        return self.head(states[:, queries:])

    def checkpoint(self, *, image: bool = True) -> dict[str, Tensor]:
        """All tensors in LAVIS's names; image: whether those of the frozen encoder are there."""
        out = {lavis_name(name): value for name, value in self.inner.state_dict().items()}
        for name in [name for name in out if name.endswith("attn.qkv.bias")]:
            query, _, value = out.pop(name).chunk(3)
            block = name.removesuffix("qkv.bias")
            out |= {f"{block}q_bias": query, f"{block}v_bias": value}
        out |= {f"Qformer.cls.predictions.{name}": value for name, value in self.head.state_dict().items()}
        out |= {"temp": torch.tensor(self.temp), POSITION_IDS: torch.arange(POSITIONS)[None]}
        return {name: value for name, value in out.items() if image or not name.startswith("visual_encoder.")}


CLASSES = {False: "Blip2ForConditionalGeneration", True: "InstructBlipForConditionalGeneration"}
IMAGE_TOKEN = 59
"""The last word of the small language models."""
POSITION_IDS = "Qformer.bert.embeddings.position_ids"
_RENAMED = (
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.embeddings\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention\.", "attention.self."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
)


def lavis_name(name: str) -> str:
    """LAVIS's name of a tensor of transformers, which renamed them when it took them over."""
    for theirs, lavis in _RENAMED:
        name = re.sub(theirs, lavis, name)
    return name


def speaker_folder(kind, folder, *, instructed=False, seed=0, final_eps=0.0):
    """A random one of transformers' classes, saved with a tokenizer of a few words."""
    import transformers

    from tests.models.small_llm import inner as language_model
    from tests.models.small_llm import llm_folder

    words = language_model(kind, seed)
    llm_folder(folder, kind, seed)
    given = settings(use_qformer_text_input=False) | {"text_config": words.config.to_dict()}
    if instructed:
        given["qformer_config"].pop("use_qformer_text_input")
        given["qformer_config"]["max_position_embeddings"] = 20
    given.pop("image_text_hidden_size")
    config = getattr(transformers, "InstructBlipConfig" if instructed else "Blip2Config")
    model = getattr(transformers, CLASSES[instructed])(config(**given, image_token_index=IMAGE_TOKEN))
    gains(scrambled(model, seed))
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn(model.query_tokens.shape, generator=torch.Generator().manual_seed(seed)))
        for layer in model.vision_model.encoder.layers:  # LAVIS has no bias on keys
            layer.self_attn.qkv.bias[176 : 2 * 176] = 0
    model.language_model = words
    if final_eps:
        model.vision_model.post_layernorm.eps = final_eps
    model.save_pretrained(folder)
    return model.eval()


def lavis_speaker(theirs, *, name="opt_proj", image=True):
    """The tensors of a stage-2 checkpoint, which leaves out the language model."""
    out = {lavis_name(k): v for k, v in theirs.state_dict().items() if not k.startswith("language_model.")}
    for key in [key for key in out if key.endswith("attn.qkv.bias")]:
        query, _, value = out.pop(key).chunk(3)
        out |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}
    out = {key.replace("language_projection.", f"{name}."): value for key, value in out.items()}
    out[POSITION_IDS] = torch.arange(512)[None]
    return {key: value for key, value in out.items() if image or not key.startswith("visual_encoder.")}
