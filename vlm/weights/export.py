"""Our models as other libraries read them: a ``transformers`` folder, or for CLIP an open_clip one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vlm.errors import WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.weights.files import CONFIG, WEIGHTS, write_json, write_model
from vlm.weights.hf_blip import export_hf_blip
from vlm.weights.hf_blip2 import export_hf_matcher
from vlm.weights.hf_blip2_llm import export_hf_speaker
from vlm.weights.hf_parts import activation_name
from vlm.weights.hf_qformer import export_hf_qformer
from vlm.weights.keymaps.clip import hf_clip_rules, open_clip_rules
from vlm.weights.loaded import VisionLanguageModel, exportable
from vlm.weights.rules import to_theirs
from vlm.weights.vilt import export_hf_vilt


def export_hf(model: VisionLanguageModel, folder: Path | str, *, near: bool = False) -> Path:
    """Write a folder that ``transformers`` reads: CLIPModel and CLIPProcessor, or a ViLT's, BLIP's or BLIP-2's own
    classes.

    near: see `vlm.weights.hf_blip2.export_hf_matcher`. Raises WeightsError when they can't hold the network, saying
    why, or the folder can't be written.
    """
    if model.family == "vilt":
        return export_hf_vilt(model, Path(folder))
    if model.family in ("blip", "vqa"):
        return export_hf_blip(model, Path(folder))
    if model.family == "blip2":
        return export_hf_matcher(model, Path(folder), near=near)
    if model.family == "blip2-llm":
        return export_hf_speaker(model, Path(folder), near=near)
    if model.family == "qformer":
        return export_hf_qformer(model.network, folder)
    network = _clip(model, "transformers' CLIPModel")
    config = network.config
    tensors = to_theirs(network.state_dict(), hf_clip_rules(config))

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, _hf_config(config))
        write_json(target / "preprocessor_config.json", _hf_preprocessor(model))
        _save_hf_tokenizer(model, target)

    write_model(Path(folder), fill)
    return Path(folder)


def export_open_clip(model: VisionLanguageModel, folder: Path | str) -> Path:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` reads.

    Raises WeightsError when open_clip's CLIP can't hold the network, or the folder can't be written.
    """
    network = _clip(model, "open_clip's CLIP")
    config = network.config
    if (config.image.norm_eps, config.text.norm_eps) != (1e-5, 1e-5):
        raise WeightsError(
            f"{model.name} can't be written as open_clip's CLIP, whose norm_eps is always 1e-05: ours is "
            f"{config.image.norm_eps} in the image tower and {config.text.norm_eps} in the text tower. "
            "Write it for transformers (--to hf), which keeps them."
        )
    tensors = to_theirs(network.state_dict(), open_clip_rules(config))
    transform = model.transform
    modes = {"crop": "shortest", "squash": "squash", "pad": "longest"}
    if transform.resize not in modes:
        raise WeightsError(f"{model.name}: open_clip's preprocessing can't {transform.resize}; squash, crop or pad")
    preprocess = {
        "mean": list(transform.mean), "std": list(transform.std), "interpolation": transform.interpolation,
        "resize_mode": modes[transform.resize], "fill_color": 255 if transform.resize == "pad" else 0,
    }  # fmt: skip

    def fill(target: Path) -> None:
        save_file({name: value.cpu() for name, value in tensors.items()}, target / "open_clip_model.safetensors")
        write_json(
            target / "open_clip_config.json",
            {"model_cfg": _open_clip_config(config), "preprocess_cfg": preprocess},
        )

    write_model(Path(folder), fill)
    return Path(folder)


def _clip(model: VisionLanguageModel, target: str) -> Clip:
    """The network, if the published CLIP's classes can hold it."""

    def unfit(network: Clip) -> dict[str, bool]:
        config, text, image = network.config, network.config.text, network.config.image
        return {
            "its text tower is bidirectional": not text.causal,
            "its text tower is post-norm": text.norm != "pre",
            "it has token types": bool(text.token_types),
            f"its text feature is {config.text_pool!r}, not the end-of-text state": config.text_pool != "eot",
            "its image feature is a mean over patches": config.image_pool != "cls",
            "its image tower has no norm before the first layer": not image.pre_norm,
            "its image tower's last norm has an eps of its own": image.own_final_eps,
            "it has a sigmoid loss's bias": network.logit_bias is not None,
        }

    found: Clip = exportable(model, Clip, target, unfit, advice=", or train with a causal BPE text tower")
    return found


def _hf_config(config: ClipConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=image.width, intermediate_size=image.mlp_width, num_hidden_layers=image.layers,
        num_attention_heads=image.heads, image_size=image.image_size, patch_size=image.patch_size,
        hidden_act=activation_name(image.activation), layer_norm_eps=image.norm_eps, projection_dim=config.embed_dim,
    )  # fmt: skip
    words = CLIPTextConfig(
        vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.mlp_width,
        num_hidden_layers=text.layers, num_attention_heads=text.heads, max_position_embeddings=text.context_length,
        hidden_act=activation_name(text.activation), layer_norm_eps=text.norm_eps, projection_dim=config.embed_dim,
        bos_token_id=text.vocab_size - 2, eos_token_id=text.vocab_size - 1, pad_token_id=text.vocab_size - 1,
    )  # fmt: skip
    full = CLIPConfig(text_config=words.to_dict(), vision_config=vision.to_dict(), projection_dim=config.embed_dim)
    found: dict[str, Any] = full.to_dict()
    return found | {"architectures": ["CLIPModel"]}


def _hf_preprocessor(model: VisionLanguageModel) -> dict[str, Any]:
    transform = model.transform
    side, crop = transform.size, transform.resize == "crop"
    if transform.resize not in ("squash", "crop"):
        raise WeightsError(f"{model.name}: transformers' CLIP preprocessing can't {transform.resize}; squash or crop")
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": crop,
        "size": {"shortest_edge": side} if crop else {"height": side, "width": side},
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(transform.mean), "image_std": list(transform.std),
        "do_convert_rgb": True, "resample": 3 if transform.interpolation == "bicubic" else 2,
    }  # fmt: skip


def _save_hf_tokenizer(model: VisionLanguageModel, folder: Path) -> None:
    """vocab.json and merges.txt are the tokenizer's own."""
    model.tokenizer.save(folder)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": model.tokenizer.max_length,
        },
    )  # fmt: skip


def _open_clip_config(config: ClipConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    if image.activation != text.activation or image.activation not in ("gelu", "quick_gelu"):
        raise WeightsError(
            f"open_clip has one activation for both towers, gelu or quick_gelu, "
            f"not {image.activation} and {text.activation}"
        )
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": image.image_size, "layers": image.layers, "width": image.width,
            "head_width": image.width // image.heads, "mlp_ratio": image.mlp_width / image.width,
            "patch_size": image.patch_size,
        },
        "text_cfg": {
            "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.layers, "mlp_ratio": text.mlp_width / text.width,
        },
    }  # fmt: skip
