"""ALBEF in the official layout, put together from timm's ViT and transformers' BERT modules; none of ours in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BlipTextConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertOnlyMLMHead
from transformers.models.blip.modeling_blip_text import BlipTextLayer

from tests.weights.made import scrambled

SIZES: dict[str, Any] = {"image_size": 32, "image": 192, "image_layers": 2, "text": 128, "layers": 5, "alone": 3}
VOCABULARY, POSITIONS, SPACE, QUEUE = 30522, 24, 40, 6


class Text(nn.Module):
    """BERT with cross-attention in its upper layers, and its head of masked language modelling."""

    def __init__(self) -> None:
        super().__init__()
        width = SIZES["text"]
        sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 2 * width}
        settings = sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "layer_norm_eps": 1e-12}
        config = BertConfig(**settings)
        alone = BlipTextConfig(**settings, is_decoder=False)
        fusing = BlipTextConfig(**settings, is_decoder=True, encoder_hidden_size=SIZES["image"])
        for one in (alone, fusing):
            one._attn_implementation = "eager"
        layers = [BlipTextLayer(alone if i < SIZES["alone"] else fusing, i) for i in range(SIZES["layers"])]
        self.bert = nn.ModuleDict({"embeddings": BertEmbeddings(config), "encoder": nn.ModuleDict()})
        self.bert["encoder"]["layer"] = nn.ModuleList(layers)
        self.cls = BertOnlyMLMHead(config)

    def tie(self) -> None:
        """The last matrix is the word embedding, and its bias stands beside it once more."""
        head = self.cls.predictions
        head.decoder.weight, head.decoder.bias = self.bert["embeddings"].word_embeddings.weight, head.bias


class Reference(nn.Module):
    """Student and teacher in official names."""

    def __init__(self) -> None:
        super().__init__()
        for end in ("", "_m"):
            image = VisionTransformer(
                img_size=SIZES["image_size"], patch_size=16, embed_dim=SIZES["image"], depth=SIZES["image_layers"],
                num_heads=SIZES["image"] // 64, num_classes=0, global_pool="",
            )  # fmt: skip
            setattr(self, f"visual_encoder{end}", image)
            setattr(self, f"text_encoder{end}", Text())
            setattr(self, f"vision_proj{end}", nn.Linear(SIZES["image"], SPACE))
            setattr(self, f"text_proj{end}", nn.Linear(SIZES["text"], SPACE))
        self.itm_head = nn.Linear(SIZES["text"], 2)
        self.temp = nn.Parameter(torch.tensor(0.05))

    def parts(self, pixels: Tensor, ids: Tensor, mask: Tensor, end: str = "") -> dict[str, Tensor]:
        """Features, unimodal and fused states, ITM and MLM logits, as the paper describes them."""
        text: Any = getattr(self, f"text_encoder{end}")
        image = getattr(self, f"visual_encoder{end}").forward_features(pixels)
        hidden = text.bert["embeddings"](input_ids=ids)
        additive = (1.0 - mask.float())[:, None, None, :] * -1e4
        layers = text.bert["encoder"]["layer"]
        for layer in layers[: SIZES["alone"]]:
            hidden = layer(hidden, attention_mask=additive)
        fused = hidden
        for layer in layers[SIZES["alone"] :]:
            fused = layer(fused, attention_mask=additive, encoder_hidden_states=image)
        return {
            "image": F.normalize(getattr(self, f"vision_proj{end}")(image[:, 0]), dim=-1),
            "text": F.normalize(getattr(self, f"text_proj{end}")(hidden[:, 0]), dim=-1),
            "image_states": image,
            "text_states": hidden,
            "fused": fused,
            "itm": self.itm_head(fused[:, 0]),
            "mlm": text.cls(fused),
        }

    def checkpoint(self) -> dict[str, Tensor]:
        """Everything that the official file holds, queue and numbered positions included."""
        generator = torch.Generator().manual_seed(9)
        queue = F.normalize(torch.randn(2, SPACE, QUEUE, generator=generator), dim=1)
        extra = {"image_queue": queue[0], "text_queue": queue[1], "queue_ptr": torch.tensor([4])}
        for end in ("", "_m"):
            extra[f"text_encoder{end}.bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        return {name: value.clone() for name, value in self.state_dict().items()} | extra


def reference(seed: int = 0) -> Reference:
    """A small one in which every tensor is random and different."""
    torch.manual_seed(seed)
    model = Reference()
    scrambled(model, seed)
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                gain.add_(1.0)
        model.temp.fill_(0.05)
    for end in ("", "_m"):
        getattr(model, f"text_encoder{end}").tie()
    return model.eval()
