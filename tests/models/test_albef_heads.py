"""ALBEF's fine-tuned heads: losses, gradients, padding, two images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import close, far
from tests.models.small_albef import ALBEF, batch
from tests.models.small_blip import BLIP, ENC
from vlm.errors import ConfigError
from vlm.models.albef_heads import ClassifierConfig, Entailment, Nlvr2, med_two_image_text, two_image_text

ONE = ClassifierConfig(ALBEF.image, ALBEF.text)
TWIN = ClassifierConfig(BLIP.image, med_two_image_text(BLIP.text), "nlvr2", enc_id=ENC)
TWO = ClassifierConfig(ALBEF.image, two_image_text(ALBEF.text), "nlvr2")


def build(kind: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def without_gradient(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_nlvr2_of_blip_by_its_layers() -> None:
    """Of each layer a cross-attention for each image: the mean of both below, a linear map of both above."""
    model, some, pixels = build(Nlvr2, TWIN), batch(3), pairs_of_pictures(3)
    assert TWIN.text.cross_twin == (0, 1, 2, 3) and TWIN.text.cross_merged == (2, 3)
    images = [model.image(pixels[:, i]) for i in (0, 1)]
    mask, ids = some.tokens.attention_mask[:, None, None], some.tokens.input_ids.clone()
    ids[:, 0] = ENC
    x = model.text.embed(ids)
    for i, layer in enumerate(model.text.layers):
        attention = layer.self_attn["text"]
        x = layer.self_norm(x + attention(x, attention.keys_values(x), mask))
        crosses = zip((layer.cross_attn, layer.cross_other), images, strict=True)
        first, second = (cross(x, cross.keys_values(image)) for cross, image in crosses)
        joined = (first + second) / 2 if i < 2 else layer.cross_merge(torch.cat([first, second], dim=-1))
        x = layer.cross_norm(x + joined)
        x = layer.mlp_norm["text"](x + layer.mlp["text"](x))
    close(model(pixels, some.tokens).logits, model.nlvr2_head(x[:, 0]))
    assert far(model(pixels, some.tokens).logits, model(pixels.flip(1), some.tokens).logits)


def pairs_of_pictures(rows: int) -> Tensor:
    return torch.randn(rows, 2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def test_entailment() -> None:
    model, some, labels = build(Entailment, ONE).train(), batch(5, full=True), torch.tensor([0, 1, 2, 0, 1])
    assert model(some.pixels, some.tokens).loss is None
    found = model(some.pixels, some.tokens, labels)
    assert found.logits.shape == (5, 3)
    close(found.loss, F.cross_entropy(found.logits, labels))
    found.loss.backward()
    assert without_gradient(model) == []
    soft = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    pure = model(some.pixels, some.tokens, labels, soft=soft, alpha=1.0).loss
    close(pure, F.cross_entropy(found.logits, soft.softmax(dim=1)))
    close(model(some.pixels, some.tokens, labels, soft=soft, alpha=0.4).loss, 0.6 * found.loss + 0.4 * pure)


@pytest.mark.parametrize("kind", ["entailment", "nlvr2", "twin"])
def test_padding_and_batch_change_no_class(kind: str) -> None:
    some = batch(4)
    model = build(Entailment, ONE) if kind == "entailment" else build(Nlvr2, TWO if kind == "nlvr2" else TWIN)
    pixels = some.pixels if kind == "entailment" else pairs_of_pictures(4)
    together = model(pixels, some.tokens).logits
    for i in range(4):
        close(model(pixels[i : i + 1], some.tokens.select(slice(i, i + 1))).logits[0], together[i])


def test_nlvr2_by_its_layers() -> None:
    """The paper's own order: of each fusion layer a block for the first image, then one for the second."""
    model, some, pixels = build(Nlvr2, TWO), batch(3), pairs_of_pictures(3)
    assert TWO.text.layers == 6 and TWO.text.cross_layers == (2, 3, 4, 5) and TWO.text.cross_shared == (3, 5)
    images = [model.image(pixels[:, i]) for i in (0, 1)]
    mask = some.tokens.attention_mask[:, None, None]
    x = model.text.embed(some.tokens.input_ids)
    for i, layer in enumerate(model.text.layers):
        if i < 2:
            x = layer(x, mask=mask)
            continue
        projecting = model.text.layers[i - (i % 2)].cross_attn
        x = layer(x, mask=mask, image=projecting.keys_values(images[i % 2]))
    close(model(pixels, some.tokens).logits, model.nlvr2_head(x[:, 0]))
    assert far(model(pixels, some.tokens).logits, model(pixels.flip(1), some.tokens).logits)


@pytest.mark.parametrize(("task", "classes"), [("nlvr2", 2), ("assignment", 3)])
@pytest.mark.parametrize("config", [TWO, TWIN], ids=["albef", "blip"])
def test_nlvr2_learns_from_labels(config: ClassifierConfig, task: Any, classes: int) -> None:
    model, some = build(Nlvr2, replace(config, task=task)).train(), batch(3, full=True)
    found = model(pairs_of_pictures(3), some.tokens, torch.tensor([0, 1, classes - 1]))
    assert found.logits.shape == (3, classes)
    found.loss.backward()
    assert without_gradient(model) == []
    shared = [layer.cross_attn.kv is None for layer in model.text.layers[2:]]
    assert shared == ([False, True, False, True] if config is TWO else [False, False])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Nlvr2(replace(ONE, task="nlvr2")), "must be in cross_shared: two_image_text"),
        (lambda: Entailment(replace(ONE, text=replace(TWIN.text, cross_twin=(0, 1)))), "cross_merged must be among"),
        (lambda: Nlvr2(replace(TWIN, text=replace(BLIP.text, cross_twin=(0, 1)))), "them in cross_twin"),
        (lambda: Nlvr2(replace(TWO, task="entailment")), "unknown task 'entailment'"),
        (lambda: Entailment(replace(ONE, task="entailed")), "did you mean 'entailment'"),
        (lambda: Entailment(replace(ONE, text=replace(ALBEF.text, cross_shared=(2,)))), r"cross_shared \[2\]"),
        (lambda: Entailment(replace(ONE, text=replace(ALBEF.text, cross_shared=(1,)))), r"cross_shared \[1\]"),
    ],
)
def test_bad_settings_are_named(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
