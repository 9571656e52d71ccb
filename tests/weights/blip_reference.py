"""BLIP in the official layout, put together from timm's ViT and transformers' text modules; none of ours in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from tests.weights.made import scrambled

SIZES: dict[str, Any] = {"image_size": 32, "image": 192, "image_layers": 2, "text": 128, "layers": 3}
VOCABULARY, POSITIONS, SPACE, QUEUE = 30524, 24, 40, 6
DEC, ENC = 30522, 30523


class Reference(nn.Module):
    """Student and teacher in official names; encoder and decoder share all but self-attention, or nothing, or all."""

    def __init__(
        self, sharing: str = "all_but_self_attention", source: int = SIZES["image"], width: int = SIZES["text"]
    ) -> None:
        """source: width of what the decoder looks at. width: of the texts."""
        super().__init__()
        config = BlipTextConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_attention_heads=width // 64, intermediate_size=2 * width,
            max_position_embeddings=POSITIONS, num_hidden_layers=SIZES["layers"], encoder_hidden_size=SIZES["image"],
            is_decoder=True, bos_token_id=DEC,
        )  # fmt: skip
        for end in ("", "_m"):
            image = VisionTransformer(
                img_size=SIZES["image_size"], patch_size=16, embed_dim=SIZES["image"], depth=SIZES["image_layers"],
                num_heads=SIZES["image"] // 64, num_classes=0, global_pool="",
            )  # fmt: skip
            setattr(self, f"visual_encoder{end}", image)
            setattr(self, f"text_encoder{end}", BlipTextModel(config, add_pooling_layer=False))
            setattr(self, f"vision_proj{end}", nn.Linear(SIZES["image"], SPACE))
            setattr(self, f"text_proj{end}", nn.Linear(width, SPACE))
        self.itm_head = nn.Linear(width, 2)
        speaking = BlipTextConfig(**(config.to_dict() | {"encoder_hidden_size": source}))
        self.text_decoder = BlipTextLMHeadModel(speaking)
        self.temp = nn.Parameter(torch.tensor(0.05))
        self.sharing = sharing

    def tie(self) -> None:
        """Make tensors of encoder, decoder and head the same where they are shared."""
        encoder: Any = self.text_encoder
        decoder: Any = self.text_decoder.bert
        if self.sharing != "none":
            decoder.embeddings = encoder.embeddings
            for own, other in zip(decoder.encoder.layer, encoder.encoder.layer, strict=True):
                for part in ("crossattention", "intermediate", "output"):
                    setattr(own, part, getattr(other, part))
                if self.sharing == "all":
                    own.attention = other.attention
        head = self.text_decoder.cls.predictions
        head.decoder.weight, head.decoder.bias = decoder.embeddings.word_embeddings.weight, head.bias

    def parts(self, pixels: Tensor, ids: Tensor, mask: Tensor, end: str = "") -> dict[str, Tensor]:
        """Features, ITM and LM logits, as the paper describes them; of the teacher the features alone."""
        text: Any = getattr(self, f"text_encoder{end}")
        image = getattr(self, f"visual_encoder{end}").forward_features(pixels)
        hidden = text(input_ids=ids, attention_mask=mask).last_hidden_state
        found = {
            "image": F.normalize(getattr(self, f"vision_proj{end}")(image[:, 0]), dim=-1),
            "text": F.normalize(getattr(self, f"text_proj{end}")(hidden[:, 0]), dim=-1),
            "image_states": image,
        }
        if end:
            return found
        begun = {start: torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1) for start in (ENC, DEC)}
        fused = text(input_ids=begun[ENC], attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        said = self.text_decoder(input_ids=begun[DEC], attention_mask=mask, encoder_hidden_states=image).logits
        return found | {"itm": self.itm_head(fused[:, 0]), "lm": said}

    def answers(self, pixels: Tensor, questions: Any, answers: Any) -> Tensor:
        """Logits of answers to questions, by a decoder that looks at the question's states."""
        image = self.visual_encoder.forward_features(pixels)
        return answer_logits(self.text_encoder, self.text_decoder, image, questions, answers)

    def checkpoint(self) -> dict[str, Tensor]:
        """Everything that the official pre-training file holds, queue and numbered positions included."""
        generator = torch.Generator().manual_seed(9)
        queue = F.normalize(torch.randn(2, SPACE, QUEUE, generator=generator), dim=1)
        extra = {"image_queue": queue[0], "text_queue": queue[1], "queue_ptr": torch.tensor([4])}
        for text in ("text_encoder", "text_encoder_m", "text_decoder.bert"):
            extra[f"{text}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        return {name: value.clone() for name, value in self.state_dict().items()} | extra


def answer_logits(encoder: Any, decoder: Any, image: Tensor, questions: Any, answers: Any) -> Tensor:
    """Each question alone, without padding: transformers' cross-attention looks at padding, the official doesn't."""
    rows = []
    for row in range(len(image)):
        ids, said = questions.input_ids[row : row + 1].clone(), answers.input_ids[row : row + 1].clone()
        ids[:, 0], said[:, 0] = ENC, DEC
        ids = ids[:, : int(questions.attention_mask[row].sum())]
        question = encoder(input_ids=ids, encoder_hidden_states=image[row : row + 1]).last_hidden_state
        mask = answers.attention_mask[row : row + 1]
        rows.append(decoder(input_ids=said, attention_mask=mask, encoder_hidden_states=question).logits)
    return torch.cat(rows)


def reference(
    seed: int = 0, sharing: str = "all_but_self_attention", source: int = SIZES["image"], width: int = SIZES["text"]
) -> Reference:
    """A small one in which every tensor is random and different, but for what is shared."""
    torch.manual_seed(seed)
    model = Reference(sharing, source, width)
    scrambled(model, seed)
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                gain.add_(1.0)
        model.temp.fill_(0.05)
    model.tie()
    return model.eval()
