"""A small MED with random weights, small sets with one broken picture, and CapFilt on them."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.data.shards import ShardWriter
from vlm.data.tokenizers import wordpiece
from vlm.data.transforms import ImageTransform
from vlm.generate import GenerationConfig
from vlm.models.blip import Blip, BlipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViTConfig
from vlm.tasks.capfilt.settings import CapfiltConfig, Execution
from vlm.train.distributed import Ranks
from vlm.weights.loaded import VisionLanguageModel

ALONE = Ranks(0, 1, torch.device("cpu"))
HERE = Execution(batch_size=3, device="cpu")
BROKEN = "web7"
PLAIN = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")
MED = BlipConfig(
    ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    TransformerConfig(
        vocab_size=30524, context_length=48, width=32, layers=2, heads=2, mlp_width=64, cross_layers=(0, 1),
        cross_width=32,
    ),
    embed_dim=16,
)  # fmt: skip
YAML = {
    "name": "new",
    "model": {
        "embed_dim": 16,
        "image": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
        "text": {
            "vocab_size": 30524, "context_length": 48, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64,
            "cross_layers": [0, 1], "cross_width": 32,
        },
    },
    "validation": [],
    "images": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "loader": {"batch_size": 4, "workers": 0},
    "train": {"steps": 2, "log_every": 1, "optim": {"lr": 0.001, "warmup": 1}},
}  # fmt: skip
WORDS = ("red", "dog", "house", "on a hill", "tree", "blue", "boat", "of wood", "two", "cats")


def med(seed: int = 0, transform: ImageTransform = PLAIN, **settings: Any) -> VisionLanguageModel:
    """Texts differ from picture to picture, and the filter drops some of them."""
    torch.manual_seed(seed)
    network = Blip(replace(MED, **settings))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "log_scale":
                parameter.add_(torch.randn_like(parameter) * 0.25)
    return VisionLanguageModel(network.eval(), wordpiece(max_length=32), transform, name=f"med {seed}", family="blip")


@cache
def noise(number: int, suffix: str = "PNG") -> bytes:
    """A small picture, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (18 + number % 3, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def phrase(number: int) -> str:
    """A text of one to four of the words."""
    rng = np.random.default_rng(1000 + number)
    return " ".join(rng.choice(WORDS, 1 + number % 4))


def sets(folder: Path, web: int = 11, human: int = 5) -> tuple[str, str]:
    """Shards of a web set, one picture of which is broken, and of a human set; their folders."""
    with ShardWriter(str(folder / "web" / "{:05d}.tar"), samples=6) as writer:
        for i in range(web):
            image = b"no picture" if f"web{i}" == BROKEN else noise(i, "JPEG" if i % 4 == 1 else "PNG")
            meta: dict[str, Any] = {"captions": [phrase(i)], "licence": "CC0", "tags": ["secret"]}
            if i % 3 == 0:
                meta["web"] = f"IMG {i} <b>{phrase(50 + i)}</b>"
            writer.write(f"web{i}", image, "png", meta)
    with ShardWriter(str(folder / "human" / "{:05d}.tar"), samples=100) as writer:
        for i in range(human):
            captions = [phrase(200 + i), f"the {phrase(300 + i)}"][: 1 + i % 2]
            writer.write(f"human{i}", noise(100 + i), "png", {"captions": captions, "concept": f"c{i}", "tags": ["t"]})
    return str(folder / "web"), str(folder / "human")


def settings(folder: Path, **changes: Any) -> CapfiltConfig:
    """CapFilt with models that are fine-tuned already, in units of four pictures."""
    if not (folder / "captioner").exists():
        med(1).save(folder / "captioner")
        med(2).save(folder / "filter")
        (folder / "new.yaml").write_text(json.dumps(YAML))  # JSON is YAML
    web, human = sets(folder) if not (folder / "web").exists() else (str(folder / "web"), str(folder / "human"))
    given: dict[str, Any] = {
        "captioner": str(folder / "captioner"), "judge": str(folder / "filter"), "shard_samples": 4,
        "generation": GenerationConfig("nucleus", max_new_tokens=6, min_new_tokens=2),
        **dict.fromkeys(("training", "captioner_training", "judge_training"), str(folder / "new.yaml")),
        "tune": ("train.steps=2",), "check_pictures": 4,
    }  # fmt: skip
    return CapfiltConfig((web,), (human,), **(given | changes))


def content(out: Path) -> dict[str, str]:
    """Hash of every file that holds what was kept and what is said of it."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found = [path for path in files if path.parent.name in ("data", "judged") or path.name.startswith("report.")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
