"""Models from Hugging Face: a repo id, or a folder as ``transformers`` writes it; CLIP's own part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.data.tokenizers import Tokenizer, clip_bpe
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from vlm.errors import WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.weights.files import CONFIG, INDEX, WEIGHTS, build, read_json, read_weights
from vlm.weights.hf_parts import ACTS, FILTERS, read_preprocessor
from vlm.weights.keymaps.clip import HF_LEFT_OUT, hf_clip_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.rules import to_ours

BLIP2_TYPES = ("blip-2", "instructblip", "blip_2_qformer")
FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt"]


def load_hub(repo: str) -> VisionLanguageModel:
    """A Hugging Face repo's model. Raises WeightsError when it can't be fetched or is none of our stages."""
    return load_hf_folder(fetch(repo), name=repo)


def is_repo_id(name: str) -> bool:
    """Whether a name may be a Hugging Face repo's, owner/name; a folder here of that name goes first."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def fetch(repo: str) -> Path:
    """The folder of a Hugging Face repo's configuration, weights and vocabulary, in the hub's own cache.

    Raises WeightsError when it isn't there and can't be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES))
        if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
            folder = Path(snapshot_download(repo, allow_patterns=[*FILES, "pytorch_model.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise WeightsError(
            f"{repo}: no such folder here, and as a Hugging Face repo it can't be fetched ({reason}). "
            "Check the name and the network; for a local folder give its path"
        ) from error
    return folder


def load_hf_folder(folder: Path, *, name: str = "") -> VisionLanguageModel:
    """A folder with transformers' config.json and weights. Raises WeightsError when it's none of our stages."""
    settings = read_json(folder / CONFIG)
    family = settings.get("model_type")
    if family == "vilt":
        from vlm.weights.vilt import load_hf_vilt

        return load_hf_vilt(folder, settings, name or folder.name)
    if family == "blip":
        from vlm.weights.hf_blip import load_hf_blip

        return load_hf_blip(folder, settings, name or folder.name)
    if family in BLIP2_TYPES:
        from vlm.weights.hf_blip2 import load_hf_blip2

        return load_hf_blip2(folder, settings, name or folder.name, llm=name)
    if family != "clip":
        known = ("clip", "vilt", "blip", *BLIP2_TYPES)
        raise WeightsError(f"{name or folder}: model_type is {family!r}, expected one of {', '.join(known)}")
    config = hf_clip_config(settings)
    where = name or str(folder)
    ours = to_ours(read_weights(folder), hf_clip_rules(config), where=where, left_out=HF_LEFT_OUT)
    network = build(lambda: Clip(config), ours, where=where)
    return VisionLanguageModel(
        network, _tokenizer(folder, config), _transform(folder, config), name=name or folder.name, family="clip"
    )


def hf_clip_config(settings: Mapping[str, Any]) -> ClipConfig:
    """Our settings for a CLIPModel's ``config.json``; what it leaves out has transformers' defaults."""
    from transformers import CLIPConfig

    full: Any = CLIPConfig.from_dict(dict(settings))
    image: Any = full.vision_config
    text: Any = full.text_config
    for side, part in (("vision", image), ("text", text)):
        if part.hidden_act not in ACTS:
            raise WeightsError(f"{side}_config.hidden_act {part.hidden_act!r}: expected one of {', '.join(ACTS)}")
    return ClipConfig(
        image=ViTConfig(
            image_size=image.image_size, patch_size=image.patch_size, width=image.hidden_size,
            layers=image.num_hidden_layers, heads=image.num_attention_heads, mlp_width=image.intermediate_size,
            activation=ACTS[image.hidden_act], pre_norm=True, norm_eps=image.layer_norm_eps,  # type: ignore[arg-type]
        ),
        text=TransformerConfig(
            vocab_size=text.vocab_size, context_length=text.max_position_embeddings, width=text.hidden_size,
            layers=text.num_hidden_layers, heads=text.num_attention_heads, mlp_width=text.intermediate_size,
            causal=True, norm="pre", activation=ACTS[text.hidden_act], norm_eps=text.layer_norm_eps,  # type: ignore[arg-type]
        ),
        embed_dim=full.projection_dim,
        text_pool="eot",
    )  # fmt: skip


def _tokenizer(folder: Path, config: ClipConfig) -> Tokenizer:
    merges = folder / "merges.txt"
    tokenizer = clip_bpe(merges if merges.is_file() else None, max_length=config.text.context_length)
    if tokenizer.vocab_size > config.text.vocab_size:
        # Tests and small copies have a cut vocabulary: ids beyond it would read past the embedding.
        raise WeightsError(
            f"{folder}: the text tower knows {config.text.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}"
        )
    return tokenizer


def _transform(folder: Path, config: ClipConfig) -> ImageTransform:
    settings = read_preprocessor(folder)
    resize = "crop" if settings.get("do_center_crop", True) else "squash"
    return ImageTransform(
        config.image.image_size,
        tuple(settings.get("image_mean", CLIP_MEAN)),
        tuple(settings.get("image_std", CLIP_STD)),
        resize,  # type: ignore[arg-type]
        FILTERS.get(settings.get("resample", 3), "bicubic"),  # type: ignore[arg-type]
    )
