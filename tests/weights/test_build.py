"""Networks of which stored tensors become the weights, without a copy where they can be."""

from dataclasses import replace

import pytest
import torch

from vlm.errors import WeightsError
from vlm.models.clip import Clip, ClipConfig
from vlm.weights.files import build


class Odd(torch.nn.Module):
    """A weight that may have two names, and numbers that aren't stored."""

    def __init__(self, *, tied=False, numbered=False):
        super().__init__()
        self.one = torch.nn.Linear(3, 3, bias=False)
        self.two = torch.nn.Linear(3, 3, bias=False)
        if tied:
            self.two.weight = self.one.weight
        if numbered:
            self.register_buffer("numbers", torch.arange(4) + 0.5, persistent=False)


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"numbered": True}])
def test_given_tensors_become_the_weights(shape):
    tensors = {"one.weight": torch.randn(3, 3, dtype=torch.float64), "two.weight": torch.randn(3, 3).T}
    if shape.get("tied"):
        tensors["two.weight"] = tensors["one.weight"]
    found = build(lambda: Odd(**shape), tensors, where="x")
    assert all(torch.equal(value, tensors[name].to(value.dtype)) for name, value in found.state_dict().items())
    assert all(value.requires_grad and value.is_contiguous() for value in found.parameters())
    assert (found.one.weight is found.two.weight) == bool(shape.get("tied"))
    if not shape:  # nothing was copied
        assert found.one.weight.data_ptr() == tensors["one.weight"].data_ptr()
    assert [value.tolist() for value in found.buffers()] == ([[0.5, 1.5, 2.5, 3.5]] if shape.get("numbered") else [])


@pytest.mark.parametrize("numbered", [False, True])
def test_tensors_that_don_t_fit_are_refused_with_the_sizes_that_can_t_be(numbered):
    with pytest.raises(WeightsError, match=r"x: .*\n.*1 missing: two\.weight\n.*1 unexpected: three"):
        build(lambda: Odd(numbered=numbered), {"one.weight": torch.ones(3, 3), "three": torch.ones(1)}, where="x")
    config = ClipConfig()
    with pytest.raises(WeightsError, match="x: width 768 is not a multiple of heads 5"):
        build(lambda: Clip(replace(config, image=replace(config.image, heads=5))), {}, where="x")
