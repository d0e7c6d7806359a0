"""What top-k chooses everything of is written everywhere; what it chooses some of stays."""

import pytest
import torch

from tests.passes.graphs import canonical, ops

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def mask(x, k, dim=-1):
    """Of the k largest, as a sparse attention makes it."""
    chosen = x.topk(k, dim).indices
    return x + torch.full_like(x, -9.0).scatter(dim, chosen.long(), 0.0)


@pytest.mark.parametrize("fn", [lambda x: mask(x, 6), lambda x: mask(x, 5, 1),
                                lambda x: torch.zeros_like(x).scatter(-1, x.sort(-1).indices, 2.0) + x])  # fmt: skip
def test_all_are_chosen(fn):
    gm = canonical(fn, X)
    assert not {"topk.default", "sort.default", "scatter.value"} & set(ops(gm))
    assert torch.equal(gm(X)[0], fn(X))


@pytest.mark.parametrize("fn", [
    lambda x: mask(x, 4),
    lambda x: torch.zeros_like(x).scatter(1, x.topk(6).indices.clamp(max=4), 1.0) + x,  # along another axis
    lambda x: torch.zeros(2, 5, 9).scatter(-1, x.topk(6).indices, 1.0) + x.sum(),  # of more than there are
    lambda x: torch.zeros_like(x).scatter(-1, x.topk(6).indices, x),  # other values at each place
])  # fmt: skip
def test_some_are_chosen(fn):
    gm = canonical(fn, X)
    assert [op for op in ops(gm) if op.startswith("scatter")]
    assert torch.equal(gm(X)[0], fn(X))
