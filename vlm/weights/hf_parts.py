"""What a folder of ``transformers`` holds beside its weights: activations, filters, tokenizer, preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm.data.tokenizers import Tokenizer, wordpiece
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from vlm.errors import WeightsError
from vlm.models.vit import ViTConfig
from vlm.weights.files import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TEMPERATURE = "itc_temperature"
"""Key in config.json of what transformers' BLIP and BLIP-2 have no place for and leave alone."""
FILTERS = {2: "bilinear", 3: "bicubic"}
ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return {value: key for key, value in reversed(ACTS.items())}[ours]


def activation(theirs: str, *, where: str) -> str:
    """Our name of one of transformers' activations. Raises WeightsError, with the known ones, for another."""
    if theirs not in ACTS:
        raise WeightsError(f"{where}: hidden_act {theirs!r}: expected one of {', '.join(ACTS)}")
    return ACTS[theirs]


def image_config(settings: Any, *, where: str) -> ViTConfig:
    """Our settings for the ``vision_config`` of BLIP's kind. Raises WeightsError where our network has no such one."""
    image_size, patch_size = (square(getattr(settings, side), side, where) for side in ("image_size", "patch_size"))
    if not getattr(settings, "qkv_bias", True):
        raise WeightsError(f"{where}: qkv_bias false: expected true")
    return ViTConfig(
        image_size=image_size, patch_size=patch_size, width=settings.hidden_size, layers=settings.num_hidden_layers,
        heads=settings.num_attention_heads, mlp_width=settings.intermediate_size,
        activation=activation(settings.hidden_act, where=where),  # type: ignore[arg-type]
        norm_eps=settings.layer_norm_eps,
    )  # fmt: skip


def image_settings(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `image_config`."""
    return {
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "image_size": config.image_size, "patch_size": config.patch_size,
        "hidden_act": activation_name(config.activation), "layer_norm_eps": config.norm_eps,
    }  # fmt: skip


def unfit_image(config: ViTConfig, transform: ImageTransform, *, near: bool = False) -> dict[str, bool]:
    """Reasons why ``vision_config`` and BlipImageProcessor can't hold ours, and whether they are so.

    near: whether the last norm's eps may become that of the others.
    """
    return {
        "its image tower has a norm before the first layer": config.pre_norm,
        f"its image tower's last norm has an eps of {config.final_norm_eps}, the others {config.norm_eps}": (
            config.own_final_eps and not near
        ),
        f"its pictures are preprocessed by {transform.resize!r}, not squash": transform.resize != "squash",
    }


def square(value: Any, name: str, where: str) -> int:
    """A side of a setting that is a number or two equal ones. Raises WeightsError where they differ."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise WeightsError(f"{where}: {name} {value}: expected a square")
    return int(sides[0])


def read_tokenizer(folder: Path, *, max_length: int, vocab_size: int) -> Tokenizer:
    """The WordPiece tokenizer of a folder, or of bert-base-uncased where it has none.

    Raises WeightsError where it keeps upper case, or has more tokens than the network knows.
    """
    found = [path for path in (folder / "vocab.txt", folder / "tokenizer.json") if path.is_file()]
    path = folder / "tokenizer_config.json"
    if path.is_file() and not read_json(path).get("do_lower_case", True):
        raise WeightsError(f"{path}: do_lower_case is false, expected an uncased vocabulary")
    tokenizer = wordpiece(found[0] if found else None, max_length=max_length)
    if tokenizer.vocab_size > vocab_size:
        raise WeightsError(f"{folder}: the network knows {vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    return tokenizer


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor; empty where there are none."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    if (folder / PROCESSOR).is_file():
        return read_json(folder / PROCESSOR).get("image_processor") or {}
    return {}


def bert_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer_config.json says of an uncased WordPiece vocabulary."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": tokenizer.max_length, **special,
    }  # fmt: skip


def squashed(folder: Path, side: int) -> ImageTransform:
    """The preprocessing of a folder with BlipImageProcessor's settings, or with none: to a square of `side`.

    Raises WeightsError where it isn't a square.
    """
    settings = read_preprocessor(folder)
    size = settings.get("size", {"height": side, "width": side})
    if not isinstance(size, Mapping) or size.get("height") != size.get("width") or "height" not in size:
        raise WeightsError(f"{folder}: pictures of size {size}, expected a square")
    return ImageTransform(
        size["height"],
        tuple(settings.get("image_mean", CLIP_MEAN)),
        tuple(settings.get("image_std", CLIP_STD)),
        "squash",
        FILTERS.get(settings.get("resample", 3), "bicubic"),  # type: ignore[arg-type]
    )


def squashing(transform: ImageTransform) -> dict[str, Any]:
    """The inverse of `squashed`: what preprocessor_config.json says."""
    side = transform.size
    return {
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "do_resize": True,
        "size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(transform.mean), "image_std": list(transform.std), "do_convert_rgb": True,
        "resample": {value: key for key, value in FILTERS.items()}[transform.interpolation],
    }  # fmt: skip


def noted_in(settings: Mapping[str, Any], name: str, read: Callable[[Any], Any], default: Any, *, where: str) -> Any:
    """What our export noted in a folder's config.json beside transformers' settings; the default where it isn't there.

    Raises WeightsError for what can't be read.
    """
    try:
        return read(settings[name]) if settings.get(name) else default
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where}: config.json: {name} {settings[name]!r} can't be read ({error})") from error
