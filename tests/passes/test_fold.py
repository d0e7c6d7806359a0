"""What does not depend on the inputs becomes a buffer, once."""

import pytest
import torch
from torch import nn

from tests.conftest import leaves
from tests.passes.graphs import Function, X, ops, run, same
from tokcompile.errors import UnsupportedGraph


def rotary(x):
    angles = torch.outer(torch.arange(6.0), 10 ** -torch.arange(4.0))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def relative_bias(x):
    place = torch.arange(6)[:, None] - torch.arange(6)[None] + 5
    return x @ x.mT + (torch.arange(11.0) * 0.5)[place]


def causal_mask(x):
    mask = torch.full((6, 6), float("-inf")).triu(1)
    return (x @ x.mT + mask).softmax(-1)


def written_mask(x):
    mask = torch.zeros(6, 6)
    mask[:, 4:] = 1.0
    mask[0] += 2
    mask.mul_(3)
    return x @ x.mT + mask


def grown_list(x):
    return x + torch.stack([torch.full((8,), float(i)) for i in range(6)])


@pytest.mark.parametrize("fn", [rotary, relative_bias, causal_mask, written_mask, grown_list], ids=lambda f: f.__name__)
def test_what_does_not_depend_on_inputs_becomes_a_buffer(fn):
    gm = same(fn, X)
    assert any(n.op == "get_attr" and n.target.startswith("_folded_") for n in gm.graph.nodes)
    assert not {"arange.default", "cos.default", "full.default", "zeros.default", "triu.default", "copy.default"} & set(ops(gm))


def test_views_of_weights_are_not_copied():
    gm = same(nn.Linear(8, 4).requires_grad_(False), X)
    assert not any("_folded_" in str(n.target) for n in gm.graph.nodes)
    weight = nn.Parameter(torch.randn(8, 8))
    gm = same(Function(lambda x: x @ weight.t()[:, :4], weight=weight), X)
    assert {p.data_ptr() for p in gm.parameters()} == {weight.data_ptr()}
    assert not any("_folded_" in str(n.target) for n in gm.graph.nodes)


def test_what_is_computed_from_weights_is_folded():
    weight = nn.Parameter(torch.randn(8, 8))
    gm = same(Function(lambda x: x @ (weight * 2), weight=weight), X)
    assert ops(gm)[-1].startswith("matmul")
    assert "mul.Tensor" not in ops(gm)


def test_a_constant_output_is_kept():
    gm = same(lambda x: (x * 2, torch.arange(3) + 1), X)
    assert len(leaves(run(gm, X))) == 2


def test_a_weight_written_in_place_while_folding_keeps_its_value():
    weight = nn.Parameter(torch.ones(8), requires_grad=False)
    module = Function(lambda x: x * weight.clone().mul_(3), weight=weight)
    same(module, X)
    assert weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float", "bool"])
def test_a_constant_changed_after_its_use(dtype):
    """Either both values are right or it is refused."""

    def fn(x):
        mask = torch.zeros(6, 8, dtype=dtype)
        y = x + mask
        mask[0] = 1
        return y, x + mask

    try:
        same(fn, X)
    except UnsupportedGraph as refusal:
        assert "a constant is changed in place after it was used" in str(refusal)  # noqa: PT017
