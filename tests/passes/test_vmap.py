"""torch.vmap in an exported graph: plain ops with the same values, also for other inputs."""

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from tests.conftest import leaves
from tests.passes.graphs import Function, canonical, ops, run
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.trace import trace
from tokcompile.passes.vmap import flatten_vmap, regions

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def pairs(function, batch, length):
    """`function(b, q, k)` for all samples, queries and keys: (B, N, N), as attention masks are made."""
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        function = torch.vmap(function, in_dims=dims, out_dims=0)
    with TransformGetItemToIndex():  # lets the function index by the numbers that vmap runs over, as transformers does
        return function(torch.arange(batch), torch.arange(length), torch.arange(length))


def causal(x):
    mask = pairs(lambda b, q, k: k <= q, len(x), 5)
    return torch.softmax(torch.where(mask, x @ x.mT, -1e9), -1)


def window(x):
    mask = pairs(lambda b, q, k: (k <= q) & (k > q - 2), len(x), 5)
    return x @ x.mT * mask


def same_sign(x):
    """The mask depends on the input."""
    signs = (x.sum(-1) > 0).long()
    mask = pairs(lambda b, q, k: signs[b, q] == signs[b, k], len(x), 5)
    return x @ x.mT * mask


def rows(x):
    return torch.vmap(lambda row: row - row.mean())(x)


def two_results(x):
    low, high = torch.vmap(lambda row: (row.amin(), row.amax()))(x)
    return x - low[:, None, None], x - high[:, None, None]


def twice(x):
    return rows(rows(x) * 2) + 1


@pytest.mark.parametrize("fn", [causal, window, same_sign, rows, two_results, twice], ids=lambda f: f.__name__)
def test_values_are_the_same(fn):
    gm = canonical(fn, X)
    for x in (X, torch.randn_like(X)):
        got, want = leaves(run(gm, x)), leaves(fn(x))
        assert len(got) == len(want)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-6)
    assert not [op for op in ops(gm) if "vmap" in op or "batch_dim" in op or "flat_apply" in op]


@pytest.mark.parametrize("fn", [causal, window], ids=lambda f: f.__name__)
def test_a_mask_of_positions_alone_becomes_a_buffer(fn):
    gm = canonical(fn, X)
    assert not [op for op in ops(gm) if op.startswith(("arange", "le.", "gt.", "where.self"))] or fn is causal
    assert any("_folded_" in name for name, _ in gm.named_buffers())


def test_levels_entered_and_left_are_one_region():
    gm = trace(Function(twice).eval(), (X,)).gm
    assert [len([n for n in region if "nesting" in str(n.target)]) for region in regions(gm)] == [2, 2]
    assert len(regions(trace(Function(window).eval(), (X,)).gm)) == 1


def test_a_graph_without_vmap_is_left_alone():
    gm = trace(Function(lambda x: x * 2).eval(), (X,)).gm
    before = str(gm.graph)
    flatten_vmap(gm)
    assert str(gm.graph) == before


def test_what_cannot_be_written_as_plain_ops_is_refused():
    gm = trace(Function(rows).eval(), (X,)).gm
    node = next(n for n in gm.graph.nodes if "mean" in str(n.target))
    node.target = lambda value: (_ for _ in ()).throw(RuntimeError("no batching rule"))
    with pytest.raises(
        UnsupportedGraph, match=r"a function under torch.vmap cannot be written as plain ops .*no batching rule"
    ):
        flatten_vmap(gm)
