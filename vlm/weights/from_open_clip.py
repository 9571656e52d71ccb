"""CLIP from open_clip: by architecture and tag, or from a checkpoint file with OpenAI's or open_clip's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.batch import Tokens
from vlm.data.tokenizers import Tokenizer, clip_bpe
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from vlm.errors import WeightsError, nearest
from vlm.models.clip import Clip, ClipConfig
from vlm.models.foreign import ForeignClip
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import assign, build, read_tensors
from vlm.weights.keymaps.clip import OPEN_CLIP_LEFT_OUT, open_clip_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_ours

logger = logging.getLogger("vlm.weights")

# What a plain CLIP ViT's configuration may say; with anything else it runs through open_clip's own towers.
PLAIN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
# OpenAI's own files hold it, and only their networks use quick-GELU without saying so.
OPENAI = "input_resolution"
RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


@dataclass(frozen=True)
class ForeignTokenizer:
    """open_clip's tokenizer of a model; its texts are padded to the model's full length."""

    inner: Any
    pad_id: int
    max_length: int
    vocab_size: int = 0
    start_id: int = -1
    end_id: int = -1

    def __call__(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Ids (B, L) of the model's own length, whatever `max_length`."""
        ids = self.inner(list(texts)).to(torch.int64)
        return Tokens(ids, ids != self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self.inner.decode(torch.tensor(list(ids))))

    def to_dict(self) -> dict[str, Any]:
        """Refused: a foreign tokenizer has no form of ours."""
        raise WeightsError("a model on open_clip's own towers can't be saved in vlm's format")

    def save(self, folder: Path | str) -> None:
        """Refused, like `to_dict`."""
        self.to_dict()


def load_open_clip(spec: str) -> VisionLanguageModel:
    """``ARCH/TAG`` with a pretrained tag, ``ARCH/FILE`` with a checkpoint, or ``ARCH`` with random weights refused.

    Raises WeightsError naming the known architectures or tags when one isn't known, or can't be fetched.
    """
    import open_clip

    arch, _, tag = spec.partition("/")
    known = open_clip.list_models()
    if arch not in known:
        raise WeightsError(f"open_clip:{spec}: no architecture {arch!r}{nearest(arch, known)}; expected ARCH/TAG")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not tag:
        raise WeightsError(f"open_clip:{spec}: name the weights too, open_clip:{arch}/TAG; tags: {', '.join(tags)}")
    if tag not in tags and not Path(tag).is_file():
        raise WeightsError(
            f"open_clip:{spec}: {tag!r} is neither a tag of {arch}{nearest(tag, tags)} ({', '.join(tags) or 'none'}) "
            "nor a file"
        )
    config = open_clip.get_model_config(arch)
    if Path(tag).is_file():
        tensors = _without_module(read_tensors(Path(tag)))
        if is_plain(config):
            quick = bool(config.get("quick_gelu")) or OPENAI in tensors
            return _ours(tensors, name=f"open_clip:{spec}", quick=quick, config=config)
        model = open_clip.create_model(arch)
        assign(model, tensors, where=tag)
        return wrap(model, arch, name=f"open_clip:{spec}", config=config)
    try:
        model = open_clip.create_model(arch, pretrained=tag)
    except Exception as error:  # hub, network and unpickling errors of several libraries
        raise WeightsError(f"open_clip:{spec}: can't be fetched or read ({str(error)[:300]})") from error
    return wrap(model, arch, name=f"open_clip:{spec}", config=config)


def load_checkpoint(path: Path, *, tensors: Mapping[str, Tensor] | None = None) -> VisionLanguageModel:
    """A file with OpenAI's or open_clip's CLIP ViT tensors; the sizes are read from their shapes.

    tensors: what the file holds, where it was read already.

    OpenAI's files are told by their `input_resolution` and use quick-GELU; others are taken to use GELU (name
    the architecture, ``open_clip:ARCH/FILE``, where that is wrong). Raises WeightsError for other networks.
    """
    tensors = _without_module(read_tensors(path) if tensors is None else tensors)
    quick = OPENAI in tensors
    logger.info("%s: taken as a CLIP ViT with %s", path, "quick-GELU" if quick else "GELU")
    return _ours(tensors, name=path.stem, quick=quick)


def wrap(model: nn.Module, arch: str, *, name: str, config: Mapping[str, Any]) -> VisionLanguageModel:
    """An open_clip model in our classes where it is a plain CLIP ViT, else behind the same verbs."""
    transform = _transform(model.visual)
    if is_plain(config):
        quick = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"  # type: ignore[union-attr,index]
        return _ours(model.state_dict(), name=name, quick=quick, config=config, transform=transform)
    import open_clip

    try:
        tokenizer = open_clip.get_tokenizer(arch)
    except Exception as error:  # some architectures fetch their vocabulary
        raise WeightsError(f"{name}: its tokenizer can't be fetched ({str(error)[:300]})") from error
    pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0
    length = int(getattr(model, "context_length", 77) or 77)
    foreign = ForeignTokenizer(tokenizer, int(pad), length)
    return VisionLanguageModel(ForeignClip(model), foreign, transform, name=name, family="open_clip")


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether an open_clip configuration is that of a CLIP ViT with the causal text tower."""
    for part, known in PLAIN.items():
        section = config.get(part, {}) if part else config
        if not isinstance(section, Mapping) or set(section) - known:
            return False
    return isinstance(config["vision_cfg"].get("layers"), int) and "patch_size" in config["vision_cfg"]


def infer_config(tensors: Mapping[str, Tensor], *, quick: bool, where: str, prefix: str = "") -> ClipConfig:
    """Sizes of a CLIP ViT from its tensors' shapes; heads are width / 64.

    Raises WeightsError when the tensors aren't those of a CLIP ViT.
    """
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", f"{prefix}token_embedding.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise WeightsError(
            f"{where}: not a CLIP ViT checkpoint with OpenAI's or open_clip's names (missing {', '.join(missing)}); "
            f"it begins with {', '.join(list(tensors)[:3])}"
        )
    conv, places = tensors["visual.conv1.weight"], tensors["visual.positional_embedding"]
    image_width, patch = conv.shape[0], conv.shape[-1]
    text_width = tensors[f"{prefix}token_embedding.weight"].shape[1]
    act: Any = "quick_gelu" if quick else "gelu"
    return ClipConfig(
        image=ViTConfig(
            image_size=patch * round((len(places) - 1) ** 0.5), patch_size=patch, width=image_width,
            layers=_layers(tensors, "visual.transformer.resblocks."), heads=max(1, image_width // 64),
            mlp_width=tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            activation=act, pre_norm=True, norm_eps=1e-5,
        ),
        text=TransformerConfig(
            vocab_size=len(tensors[f"{prefix}token_embedding.weight"]),
            context_length=len(tensors[f"{prefix}positional_embedding"]), width=text_width,
            layers=_layers(tensors, f"{prefix}transformer.resblocks."), heads=max(1, text_width // 64),
            mlp_width=tensors[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            causal=True, norm="pre", activation=act, norm_eps=1e-5,
        ),
        embed_dim=tensors["visual.proj"].shape[1],
        text_pool="eot",
    )  # fmt: skip


def _ours(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    quick: bool,
    config: Mapping[str, Any] | None = None,
    transform: ImageTransform | None = None,
) -> VisionLanguageModel:
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    found = infer_config(tensors, quick=quick, where=name, prefix=prefix)
    if config is not None:
        found = _with_heads(found, config)
    rules = open_clip_rules(found, text_prefix=prefix)
    ours = to_ours(tensors, rules, where=name, left_out=OPEN_CLIP_LEFT_OUT)
    network = build(lambda: Clip(found), ours, where=name)
    tokenizer: Tokenizer = clip_bpe(max_length=found.text.context_length)
    if transform is None:
        transform = ImageTransform(found.image.image_size, CLIP_MEAN, CLIP_STD, "crop")
    return VisionLanguageModel(network, tokenizer, transform, name=name, family="clip")


def _without_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as they were before DDP put its own in front."""
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _with_heads(found: ClipConfig, config: Mapping[str, Any]) -> ClipConfig:
    """The head counts that the configuration names; shapes don't tell them."""
    import dataclasses

    heads = found.image.width // int(config["vision_cfg"].get("head_width", 64))
    image = dataclasses.replace(found.image, heads=heads)
    text = dataclasses.replace(found.text, heads=int(config["text_cfg"].get("heads", found.text.heads)))
    return dataclasses.replace(found, image=image, text=text)


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def _transform(visual: Any) -> ImageTransform:
    settings = dict(getattr(visual, "preprocess_cfg", None) or {})
    size = settings.get("size") or visual.image_size
    side = int(size[0] if isinstance(size, list | tuple) else size)
    return ImageTransform(
        side,
        tuple(settings.get("mean") or CLIP_MEAN),
        tuple(settings.get("std") or CLIP_STD),
        RESIZE.get(str(settings.get("resize_mode")), "crop"),  # type: ignore[arg-type]
        settings.get("interpolation") if settings.get("interpolation") == "bilinear" else "bicubic",  # type: ignore[arg-type]
    )
