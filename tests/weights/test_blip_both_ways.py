"""Each published head of BLIP: from the official file to transformers and back, with the same numbers all the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlm
from tests.weights.blip_reference import SIZES, reference
from tests.weights.test_blip import CAPTION as SAYS
from tests.weights.test_blip import MATCH as MATCHES
from tests.weights.test_blip import inputs, only, saved
from tests.weights.test_hf_blip import CAPTION, MATCH, VQA, check_answers, check_captions, check_matches
from vlm.apps.cli import app
from vlm.generate import GenerationConfig
from vlm.weights.files import read_tensors

ANSWERS = ("visual_encoder", "text_encoder", "text_decoder")
KINDS: dict[str, Any] = {
    CAPTION: (SAYS, check_captions),
    MATCH: (MATCHES, check_matches),
    VQA: (ANSWERS, check_answers),
}


def export(model: Path, to: str, out: Path) -> Path:
    run = CliRunner().invoke(app, ["export", "--model", str(model), "--to", to, "--out", str(out)])
    assert run.exit_code == 0, run.output
    return out


@pytest.mark.parametrize("name", KINDS)
def test_official_to_transformers_and_back(name: str, tmp_path: Path) -> None:
    import transformers

    parts, check = KINDS[name]
    wide = SIZES["image"]  # transformers' answers look at a question as wide as an image
    theirs = reference(4, "none", source=wide, width=wide) if name == VQA else reference(4)
    stored = only(theirs.checkpoint(), *parts)
    first = vlm.load(saved(stored, tmp_path / "first.pth"), device="cpu")
    folder = export(tmp_path / "first.pth", "hf", tmp_path / "hf")
    again, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check(first, again.eval())
    second = vlm.load(folder, device="cpu")
    assert second.network.config == first.network.config, "a captioner's prompt too"
    assert all(torch.equal(one, second.network.state_dict()[key]) for key, one in first.network.state_dict().items())
    if name == CAPTION:
        config = GenerationConfig(beams=3, max_new_tokens=8)
        ids = [model.generate(inputs()[0], config=config).ids for model in (first, second)]
        assert torch.equal(*ids)
    back = read_tensors(export(folder, "official", tmp_path / "back.pth"))
    assert set(back) - {"temp"} == set(stored)
    assert all(torch.equal(back[key], value) for key, value in stored.items())
