"""What loading a model takes at its peak: about the size of its weights, in each format."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.data.tokenizers import Tokenizer, clip_bpe, wordpiece
from vlm.data.transforms import ImageTransform
from vlm.models.albef import Albef, AlbefConfig
from vlm.models.blip import Blip, BlipConfig
from vlm.models.clip import Clip, ClipConfig
from vlm.models.transformer import TransformerConfig
from vlm.models.vilt import Vilt, ViltConfig
from vlm.models.vit import ViTConfig
from vlm.weights.export import export_hf
from vlm.weights.keymaps.clip import open_clip_rules
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.official import Training, export_official
from vlm.weights.rules import to_theirs

ROOT = Path(__file__).parents[2]
IMAGE = ViTConfig(32, 16, 384, 2, 6, 1536)
TEXT = TransformerConfig(30522, 64, 384, 2, 6, 1536, token_types=2, cross_layers=(0, 1), cross_width=384)
MOST = 1.4
"""Times what must be read: room for tokenizers, and for what is joined, such as a ViT's query, key and value."""
MEASURE = """
import ctypes, gc, json, sys
import vlm

def kilobytes(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name + ":")).split()[1])

def load(path):
    return vlm.load(path, device="cpu")

found = {}
for path in sys.argv[1:]:
    load(path)  # what is imported on the way doesn't count
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    model = load(path)
    sum(float(value.sum()) for value in model.network.parameters())  # read, all of it
    found[path] = (kilobytes("VmHWM") - before) * 1024
    del model
print(json.dumps(found))
"""


def model(network: torch.nn.Module, family: str, tokenizer: Tokenizer, resize: str = "squash") -> VisionLanguageModel:
    transform = ImageTransform(32, resize=resize, multiple=16 if resize == "fit" else 1)  # type: ignore[arg-type]
    return VisionLanguageModel(network, tokenizer, transform, name="m", family=family)


def bytes_of(model: VisionLanguageModel, *, twice: bool = False) -> int:
    """Of the weights. twice: with the words, which the file holds once more, to be compared."""
    sizes = {name: value.numel() * value.element_size() for name, value in model.network.named_parameters()}
    words = sum(size for name, size in sizes.items() if name.endswith("tokens.weight"))
    return sum(sizes.values()) + twice * words


def write_models(folder: Path) -> dict[str, int]:
    """A model in each format that is read, about 80 MB each: its path, and the bytes that must be read."""
    words = wordpiece(max_length=64)
    albef = model(Albef(AlbefConfig(IMAGE, TEXT, embed_dim=64)), "albef", words)
    albef.save(folder / "own")
    queue = torch.randn(4096, 64)
    export_official(albef, folder / "albef.pth", training=Training(albef.network.state_dict(), queue, queue, 0))
    med = replace(TEXT, vocab_size=30524, token_types=0)
    blip = model(Blip(BlipConfig(IMAGE, med, ("lm",), dec_id=30522, enc_id=30523)), "blip", words)
    export_hf(blip, folder / "hf-blip")
    export_official(blip, folder / "blip.pth")
    vilt = model(Vilt(ViltConfig(IMAGE, vocab_size=30522, context_length=64)), "vilt", words, "fit")
    export_hf(vilt, folder / "hf-vilt")
    causal = TransformerConfig(49408, 64, 384, 2, 6, 1536, causal=True, norm="pre", norm_eps=1e-5)
    config = ClipConfig(replace(IMAGE, pre_norm=True, norm_eps=1e-5), causal, embed_dim=64, text_pool="eot")
    clip = model(Clip(config), "clip", clip_bpe(max_length=64), "crop")
    export_hf(clip, folder / "hf-clip")
    torch.save(to_theirs(clip.network.state_dict(), open_clip_rules(config)), folder / "clip.pt")
    found = {"own": bytes_of(albef), "hf-vilt": bytes_of(vilt)} | dict.fromkeys(("hf-clip", "clip.pt"), bytes_of(clip))
    found |= {"albef.pth": bytes_of(albef, twice=True)}
    found |= dict.fromkeys(("hf-blip", "blip.pth"), bytes_of(blip, twice=True))
    return {str(folder / name): size for name, size in found.items()}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as Linux tells them")
def test_loading_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    sizes = write_models(tmp_path)
    # Large blocks are given back to the system at once, so that none is there already when the peak is measured.
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *sizes], capture_output=True, text=True, env=os.environ | changes, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = {Path(path).name: round(peak / sizes[path], 2) for path, peak in json.loads(done.stdout).items()}
    assert len(found) == len(sizes) and max(found.values()) < MOST, found
    assert min(found.values()) > 0.9, found  # the measure sees the weights
