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
