"""Language modelling figures against texts read one by one, prompts left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.tasks.fused import fused_model, med_model
from tests.tasks.small import noise
from tests.tasks.test_retrieval import captioned
from vlm.errors import MissingVerbError
from vlm.tasks.language import evaluate_language

TEXTS = ["thing", "a very long story about one thing", "two things and more"]


@pytest.mark.parametrize("prompt", ["", "a picture of"])
@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("lm",)])
def test_batched_equals_text_by_text(tmp_path: Path, prompt: str, heads: tuple[str, ...]) -> None:
    source = captioned(tmp_path / "set", [(p, TEXTS[n % 3], f"c{n}") for n, p in enumerate(noise(5))])
    plain = med_model(heads=heads)
    given = plain.tokenizer([prompt]).input_ids[0, 1:-1].tolist()
    model = med_model(heads=heads, prompt_ids=tuple(given))
    losses, right = [], []
    for n in range(5):
        tokens = plain.tokens(f"{prompt} {TEXTS[n % 3]}".strip())
        logits = model.lm_logits(model.pixels(source[n].image), tokens)[0, len(given) : -1]
        truth = tokens.input_ids[0, 1 + len(given) :]
        losses.append(F.cross_entropy(logits, truth, reduction="none"))
        right.append(logits.argmax(dim=-1) == truth)
    report = evaluate_language(model, source, batch_size=3)
    assert report.tokens == len(torch.cat(losses))
    assert report.loss == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert report.figures() == {"lm_loss": report.loss, "lm_accuracy": torch.cat(right).float().mean().item()}


def test_models_that_say_nothing_are_named(tmp_path: Path) -> None:
    source = captioned(tmp_path / "set", [(p, "thing", f"c{n}") for n, p in enumerate(noise(2))])
    with pytest.raises(MissingVerbError, match="no lm_logits; BLIP and BLIP-2 can"):
        evaluate_language(fused_model(), source)
    with pytest.raises(MissingVerbError, match="no lm head"):
        evaluate_language(med_model(heads=("itc", "itm")), source)
