"""The filter: the verdicts are the network's own, each picture is encoded once, and a missing head is named."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.tasks.capfilt.small import med, phrase
from tests.tasks.small import colour_model
from vlm.errors import MissingVerbError
from vlm.tasks.capfilt.judge import Judge, need_heads

TEXTS = [[phrase(0), phrase(7)], [phrase(3)], [], ["", phrase(2), "  ", phrase(11)]]


def pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def counting(asked: Counter[str], verb: str, call: Any) -> Any:
    def counted(first: Any, *more: Any) -> Any:
        asked[verb] += len(first["input_ids"]) if verb == "text_states" else len(first)
        return call(first, *more)

    return counted


def test_verdicts_are_those_of_each_pair_alone() -> None:
    model, images = med(), pixels()
    found = Judge(model).verdicts(images, TEXTS)
    assert [[one is None for one in some] for some in found] == [[not text.strip() for text in some] for some in TEXTS]
    for row, some in enumerate(TEXTS):
        for text, verdict in zip(some, found[row], strict=True):
            if verdict is None:
                continue
            with torch.inference_mode():
                alone, words = images[row : row + 1], model.tokens(text)
                itm = model.match(alone, words).softmax(dim=1)[0, 1]
                itc = (model.encode_image(alone) * model.encode_text(words)).sum()
            assert verdict.itm == pytest.approx(float(itm), abs=1e-5)
            assert verdict.itc == pytest.approx(float(itc), abs=1e-5)
    scores = {verdict.itm for some in found for verdict in some if verdict}
    assert len(scores) == 5


def test_each_picture_is_encoded_once_whatever_texts_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = med(), Counter[str]()
    network: Any = model.network
    for verb in ("image_states", "image_keys_values", "text_states", "match_states"):
        monkeypatch.setattr(network, verb, counting(asked, verb, getattr(network, verb)))
    Judge(model).verdicts(pixels(), TEXTS)
    assert asked == {"image_states": 4, "image_keys_values": 4, "text_states": 5, "match_states": 5}


def test_a_missing_head_is_named() -> None:
    with pytest.raises(MissingVerbError, match=r"med 0.* has no itm head \(it has: lm\)"):
        Judge(med(heads=("lm",)))
    with pytest.raises(MissingVerbError, match=r"med 0.* has no lm head \(it has: itc, itm\)"):
        need_heads(med(heads=("itc", "itm")), "itm", "lm")
    with pytest.raises(MissingVerbError, match="has no lm, itm head of a MED; CapFilt needs a BLIP"):
        need_heads(colour_model(), "lm", "itm")
