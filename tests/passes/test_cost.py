"""FLOPs from axis sizes against torch's own counter, before and after a reduction."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.passes.graphs import canonical, fixed, rewriter, run, subset
from tokcompile.passes.cost import axis_size, richer, terms, total
from tokcompile.passes.tokens import Batch, Seq, Space

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
W = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))


def counted(gm, *inputs) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(gm, *inputs)
    return counter.get_total_flops()


def heads(x):
    return x.unflatten(2, (2, 8)).transpose(1, 2)


OPS = {
    "linear": lambda x: F.linear(x, W.T),
    "matmul": lambda x: x @ W,
    "matmul-batched": lambda x: x @ x.mT,
    "mm": lambda x: torch.mm(x[0], W),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "addmm": lambda x: torch.addmm(W[0], x[0], W),
    "baddbmm": lambda x: torch.baddbmm(torch.ones(2, 12, 12), x, x.mT),
    "einsum": lambda x: torch.einsum("bnd,bmd->bnm", x, x),
    "einsum-weights": lambda x: torch.einsum("bnd,de->bne", x, W),
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
    "attention-masked": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), torch.ones(12, 12).tril()),
    "attention-causal": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True),
    "attention-other-value-width": lambda x: F.scaled_dot_product_attention(x, x, x[..., :4]),
    "attention-cross": lambda x: F.scaled_dot_product_attention(x[:, :3], x, x),
    "attention-grouped": lambda x: F.scaled_dot_product_attention(
        x.unflatten(2, (4, 4)).mT, x.unflatten(2, (4, 4)).mT[:, :, :2], x.unflatten(2, (4, 4)).mT[:, :, :2], enable_gqa=False),
    "conv1d": lambda x: F.conv1d(x.mT, torch.ones(5, 16, 3), padding=1),
    "conv2d": lambda x: F.conv2d(x.mT.unflatten(2, (3, 4)), torch.ones(5, 16, 2, 2), stride=2),
    "conv2d-grouped": lambda x: F.conv2d(x.mT.unflatten(2, (3, 4)), torch.ones(16, 1, 3, 3), padding=1, groups=16),
    "conv-transpose2d": lambda x: F.conv_transpose2d(x.mT.unflatten(2, (3, 4)), torch.ones(16, 5, 2, 2), stride=2),
    "nothing": lambda x: F.gelu(x).softmax(-1).mean(1),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_cost_of_an_op(name):
    gm = canonical(OPS[name], X)
    assert total(terms(gm.graph, {})) == counted(gm, X)


REDUCED = ["linear", "matmul", "matmul-batched", "bmm", "einsum", "einsum-weights", "attention", "attention-masked", "baddbmm"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", REDUCED)
def test_the_cost_after_a_reduction(name, batch):
    """The labels of the rewritten graph size the terms of the old one."""
    x = X[:batch]
    fn = OPS[name] if name != "baddbmm" else lambda x: torch.baddbmm(torch.ones(1, 12, 12).expand(x.shape[0], -1, -1), x, x.mT)
    gm = canonical(fn, x)
    out = rewriter(gm, fixed(subset(batch, 11, 6)), 11, 6, prefix=1).run()
    costs = terms(gm.graph, out.labels, out.recovered)
    assert total(costs) == counted(out.gm, x)
    for k in (2, 9):
        other = rewriter(gm, fixed(subset(batch, 11, k)), 11, k, prefix=1).run()
        assert total(costs, {out.spaces[0]: k}) == counted(other.gm, x)


def test_what_is_recovered_costs_all_of_it():
    gm = canonical(lambda x: F.conv1d(x.mT, torch.ones(5, 16, 3), padding=1), X)
    out = rewriter(gm, fixed(subset(2, 12, 6)), 12, 6).run()
    assert out.recoveries
    assert total(terms(gm.graph, out.labels, out.recovered)) == total(terms(gm.graph, {}))


def test_sizes_of_axes():
    first = Space("s", 10, 4)
    second = Space("t", 4, 2, first)
    axis = (Batch(3), Seq((1, first, second)), 5)
    assert axis_size(axis, {}) == 3 * (1 + 4 + 2) * 5
    assert axis_size(axis, {first: 6, second: 1}) == 3 * (1 + 6 + 1) * 5
    assert axis_size((), {}) == 1
    assert richer((4,), (Seq((first,)),)) == (Seq((first,)),)
    assert richer((Seq((second,)),), (Seq((first,)),)) == (Seq((second,)),)
