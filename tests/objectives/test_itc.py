"""ITC: hand-computed cases, open_clip's losses, a slow loop, ranks, chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.objectives.itc import cosines, itc, positives, sigmoid_itc, soft_cross_entropy

SCALE, BIAS = torch.tensor(7.0), torch.tensor(-3.0)


def features(rows: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def distinct(rows: int) -> Tensor:
    return torch.arange(2 * rows).reshape(2, rows).T.contiguous()


def slow_softmax(image: Tensor, text: Tensor, ids: Tensor, scale: float) -> float:
    """The definition, pair by pair, in plain Python."""

    def one_way(rows: Tensor, columns: Tensor) -> float:
        total = 0.0
        for i in range(len(rows)):
            logits = [scale * float(rows[i] @ columns[j]) for j in range(len(columns))]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            same = [
                j
                for j in range(len(columns))
                if any(a == b for a, b in zip(ids[i].tolist(), ids[j].tolist(), strict=True))
            ]
            total += sum(log_sum - logits[j] for j in same) / len(same)
        return total / len(rows)

    return 0.5 * (one_way(image, text) + one_way(text, image))


def slow_sigmoid(image: Tensor, text: Tensor, ids: Tensor, scale: float, bias: float) -> float:
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            logit = scale * float(image[i] @ text[j]) + bias
            same = any(a == b for a, b in zip(ids[i].tolist(), ids[j].tolist(), strict=True))
            total += math.log1p(math.exp(-logit if same else logit))
    return total / len(image)


def softmax_loss(image: Tensor, text: Tensor, ids: Tensor, **options: object) -> Tensor:
    return itc(image, text, image, text, scale=SCALE, row_ids=ids, ids=ids, **options)  # type: ignore[arg-type]


def sigmoid_loss(image: Tensor, text: Tensor, ids: Tensor, **options: object) -> Tensor:
    return sigmoid_itc(
        image,
        text,
        text,
        scale=SCALE,
        bias=BIAS,
        row_ids=ids,
        ids=ids,
        **options,  # type: ignore[arg-type]
    )


BOTH = pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])


def test_positives_agree_in_any_kind_of_id() -> None:
    rows = torch.tensor([[1, 10], [2, 20]])
    columns = torch.tensor([[1, 99], [3, 10], [10, 1], [2, 20]])
    expected = [[True, True, False, False], [False, False, False, True]]
    assert positives(rows, columns).tolist() == expected


def test_soft_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    positive = torch.tensor([[False, True], [True, True]])
    expected = torch.tensor([math.log(4.0) - math.log(3.0), math.log(2.0)])
    torch.testing.assert_close(soft_cross_entropy(logits, positive), expected)


def test_smoothed_targets_are_torchs_own() -> None:
    logits, same = torch.randn(5, 5, dtype=torch.float64), torch.eye(5, dtype=torch.bool)
    expected = F.cross_entropy(logits, torch.arange(5), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, same, 0.1), expected)


def test_the_nearest_of_several_features_counts() -> None:
    """BLIP-2's queries, by hand and against a loop; either side may have them."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])  # two pictures, two queries each
    columns = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.8, 0.6]])
    torch.testing.assert_close(cosines(rows, columns), torch.tensor([[1.0, 0.0, 0.8], [0.6, 0.0, 0.96]]))
    torch.testing.assert_close(cosines(columns, rows), cosines(rows, columns).T)


def test_softmax_over_queries_equals_the_slow_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    image = F.normalize(torch.randn(6, 3, 8, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=-1)
    best = torch.stack([torch.stack([(image[i] @ text[j]).max() for j in range(6)]) for i in range(6)])
    both = [F.cross_entropy(7 * one, torch.arange(6)) for one in (best, best.T)]
    for chunk in (0, 4):
        found = itc(image, text, image, text, scale=SCALE.double(), row_ids=distinct(6), ids=distinct(6), chunk=chunk)
        torch.testing.assert_close(found, (both[0] + both[1]) / 2)


def test_softmax_by_hand() -> None:
    eye = torch.eye(2)
    scale = torch.tensor(math.log(3.0))  # logits are log 3 on the diagonal, 0 off it
    ids = distinct(2)
    apart = itc(eye, eye, eye, eye, scale=scale, row_ids=ids, ids=ids)
    assert float(apart) == pytest.approx(math.log(4 / 3))
    alike = torch.zeros(2, 1, dtype=torch.long)
    together = itc(eye, eye, eye, eye, scale=scale, row_ids=alike, ids=alike)
    assert float(together) == pytest.approx(math.log(4.0) - 0.5 * math.log(3.0))


def test_sigmoid_by_hand() -> None:
    eye, ids = torch.eye(2), distinct(2)
    loss = sigmoid_itc(eye, eye, eye, scale=torch.tensor(2.0), bias=torch.tensor(-1.0), row_ids=ids, ids=ids)
    # On the diagonal the logit is 1 and wanted, off it -1 and not: four times softplus(-1) over two rows.
    assert float(loss) == pytest.approx(2 * math.log1p(math.exp(-1.0)))


def test_softmax_equals_open_clip() -> None:
    image, text = (x.requires_grad_() for x in features(9))
    ours = torch.autograd.grad(softmax_loss(image, text, distinct(9)), (image, text))
    reference = open_clip.ClipLoss()(image, text, SCALE)
    theirs = torch.autograd.grad(reference, (image, text))
    torch.testing.assert_close(softmax_loss(image, text, distinct(9)), reference)
    torch.testing.assert_close(ours, theirs)


def test_sigmoid_equals_open_clip() -> None:
    image, text = (x.requires_grad_() for x in features(9))
    reference = SigLipLoss()(image, text, SCALE, BIAS)
    ours = sigmoid_loss(image, text, distinct(9))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(torch.autograd.grad(ours, (image, text)), torch.autograd.grad(reference, (image, text)))


REPEATS = torch.tensor([[0, 5], [0, 6], [1, 5], [2, 7], [3, 8], [3, 8]])


def test_repeated_ids_equal_the_slow_loop() -> None:
    image, text = features(6)
    assert float(softmax_loss(image, text, REPEATS)) == pytest.approx(
        slow_softmax(image, text, REPEATS, float(SCALE)), abs=1e-10
    )
    assert float(sigmoid_loss(image, text, REPEATS)) == pytest.approx(
        slow_sigmoid(image, text, REPEATS, float(SCALE), float(BIAS)), abs=1e-10
    )


@BOTH
def test_repeats_change_the_loss(loss: Callable[..., Tensor]) -> None:
    image, text = features(6)
    assert abs(float(loss(image, text, REPEATS)) - float(loss(image, text, distinct(6)))) > 1e-3


def test_equal_ids_are_never_negatives() -> None:
    """A positive's logit is never pushed down below its share, a negative's is never pulled up."""
    logits = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    same = positives(REPEATS, REPEATS)
    (slope,) = torch.autograd.grad(soft_cross_entropy(logits, same).sum(), logits)
    assert (slope[same] < 0).all()
    assert (slope[~same] > 0).all()

    image, text = features(6)
    text = text.clone().requires_grad_()
    row = sigmoid_itc(image[:1], text[:1], text, scale=SCALE, bias=BIAS, row_ids=REPEATS[:1], ids=REPEATS)
    (slope,) = torch.autograd.grad(row, text)
    along = (slope * image[:1]).sum(dim=1)  # the sign of each text's move relative to image 0
    assert (along[same[0]] < 0).all()
    assert (along[~same[0]] > 0).all()


@BOTH
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 10, 64])
def test_chunks_equal_the_whole(loss: Callable[..., Tensor], chunk: int) -> None:
    ids = torch.cat([REPEATS, REPEATS + 3])[:10]

    def run(size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        image, text = (x.float().requires_grad_() for x in features(10))
        value = loss(image, text, ids, chunk=size)
        return value, torch.autograd.grad(value, (image, text))

    (whole, slopes), (parts, part_slopes) = run(0), run(chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part_slopes, slopes, rtol=1e-6, atol=1e-6)


def test_chunks_pass_gradients_to_scale_and_bias() -> None:
    image, text = features(7)

    def run(chunk: int) -> tuple[Tensor, ...]:
        scale, bias = (x.double().requires_grad_() for x in (SCALE, BIAS))
        shared = {"row_ids": distinct(7), "ids": distinct(7), "chunk": chunk}
        one = itc(image, text, image, text, scale=scale, **shared)  # type: ignore[arg-type]
        two = sigmoid_itc(image, text, text, scale=scale, bias=bias, **shared)  # type: ignore[arg-type]
        return torch.autograd.grad(one + two, (scale, bias))

    torch.testing.assert_close(run(2), run(0))
    assert all(float(slope.abs()) > 1e-3 for slope in run(0))


class Largest(TorchDispatchMode):
    """Notes the largest float tensor that any operation makes, in the forward and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@BOTH
def test_chunks_hold_less(loss: Callable[..., Tensor]) -> None:
    rows = 128

    def saved(chunk: int) -> tuple[int, int]:
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        image, text = (x.float().requires_grad_() for x in features(rows))
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(image, text, distinct(rows), chunk=chunk).backward()
        return sum(held.values()), largest.elements

    (whole_bytes, whole_largest), (bytes_, largest) = saved(0), saved(8)
    assert whole_largest == rows * rows
    assert largest == 8 * rows
    assert whole_bytes > 4 * rows * rows
    assert bytes_ < whole_bytes / 4


@BOTH
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_rows_of_all_ranks_sum_to_the_joined_batch(loss: Callable[..., Tensor], cut: int) -> None:
    """Two ranks' own rows against everyone, each weighted by its rows, are the joined batch's loss."""
    ids = torch.cat([REPEATS, REPEATS + 2])[:8]
    image, text = (x.requires_grad_() for x in features(8))
    joined = loss(image, text, ids)
    slopes = torch.autograd.grad(joined, (image, text))

    total, summed = 0.0, [torch.zeros_like(image), torch.zeros_like(text)]
    for rows in (slice(0, cut), slice(cut, 8)):
        images, texts = (x.detach().clone().requires_grad_() for x in (image, text))  # what a gather gives
        shared = {"scale": SCALE, "row_ids": ids[rows], "ids": ids}
        if loss is softmax_loss:
            part = itc(images[rows], texts[rows], images, texts, **shared)  # type: ignore[arg-type]
        else:
            part = sigmoid_itc(images[rows], texts[rows], texts, bias=BIAS, **shared)  # type: ignore[arg-type]
        weight = len(ids[rows]) / 8
        total += weight * part.detach()
        for whole, slope in zip(summed, torch.autograd.grad(part, (images, texts)), strict=True):
            whole += weight * slope
    torch.testing.assert_close(total, joined.detach())
    torch.testing.assert_close(tuple(summed), slopes)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows = draw(st.integers(1, 8))
    ids = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=rows, max_size=rows))
    return *features(rows, seed=draw(st.integers(0, 10_000))), torch.tensor(ids)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_any_batch_equals_the_slow_loop(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    assert float(softmax_loss(*batch)) == pytest.approx(slow_softmax(*batch, float(SCALE)), abs=1e-9)
    expected = slow_sigmoid(*batch, float(SCALE), float(BIAS))
    assert float(sigmoid_loss(*batch)) == pytest.approx(expected, abs=1e-9)


@BOTH
@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 1000), chunk=st.integers(0, 9))
def test_order_and_chunk_do_not_matter(
    loss: Callable[..., Tensor], batch: tuple[Tensor, Tensor, Tensor], seed: int, chunk: int
) -> None:
    image, text, ids = batch
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    shuffled = loss(image[order], text[order], ids[order], chunk=chunk)
    torch.testing.assert_close(shuffled, loss(image, text, ids))


@settings(max_examples=40, deadline=None)
@given(batches())
def test_softmax_is_symmetric_and_not_negative(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, ids = batch
    torch.testing.assert_close(softmax_loss(text, image, ids), softmax_loss(image, text, ids))
    assert float(softmax_loss(image, text, ids)) >= -1e-12


def test_a_batch_of_one() -> None:
    image, text = (x.requires_grad_() for x in features(1))
    loss = softmax_loss(image, text, distinct(1))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)  # nothing to confuse it with
    loss.backward()
    assert float(image.grad.abs().max()) < 1e-12  # type: ignore[union-attr]
    logit = (SCALE * (image * text).sum() + BIAS).item()
    assert sigmoid_loss(image, text, distinct(1)).item() == pytest.approx(math.log1p(math.exp(-logit)))


def test_large_scales_stay_finite() -> None:
    image, text = (x.float().requires_grad_() for x in features(6))
    scale = torch.tensor([100.0], requires_grad=True)
    loss = itc(image, text, image, text, scale=scale, row_ids=REPEATS, ids=REPEATS)
    loss = loss + sigmoid_itc(image, text, text, scale=scale, bias=BIAS, row_ids=REPEATS, ids=REPEATS)
    slopes = torch.autograd.grad(loss, (image, text, scale))
    assert loss.isfinite() and all(slope.isfinite().all() for slope in slopes)


def test_wrong_shapes_raise() -> None:
    image, text = features(4)
    with pytest.raises(ValueError, match="differ in their kinds"):
        itc(image, text, image, text, scale=SCALE, row_ids=distinct(4)[:, :1], ids=distinct(4))
    with pytest.raises(RuntimeError):
        softmax_loss(image, text[:2], distinct(4))
    with pytest.raises(ValueError):
        itc(image, text, image, text, scale=SCALE, row_ids=distinct(6), ids=distinct(4), chunk=2)
