"""Tokens that a model puts in another order by a constant, after some of them are gone: windows undone, rows of a mosaic."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.tiny import LENGTH, WIDTH, tiny
from tokcompile import Keep, Recipe, Tokens

WHOLE = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
HALVES = torch.cat([torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(6, 12)])


class Order(nn.Module):
    def __init__(self, order, select=False):
        super().__init__()
        self.register_buffer("order", order)
        self.select = select

    def forward(self, x):
        return x.index_select(1, self.order) if self.select else x[:, self.order.flatten()]  # a view of several rows, or itself


@pytest.mark.every(3)
@pytest.mark.parametrize("select", [False, True], ids=["index", "index_select"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", [WHOLE, HALVES, torch.arange(LENGTH)], ids=["whole", "halves", "none"])
def test_both_oracles_agree(order, batch, select):
    model, _ = tiny(Order(order if select else order.view(2, -1), select))
    check = tokcompile.check(model, (torch.randn(batch, LENGTH, WIDTH),), blocks=[0])
    assert check.ok, str(check)
    assert not any(r.note for r in check.results), str(check)


def test_what_is_kept_is_named_in_the_new_order():
    kept = [1, 4, 5, 9]
    model, args = tiny(Order(WHOLE))
    fixed = Recipe("fixed", lambda t, s: Keep(torch.tensor([kept]).expand(t.x.shape[0], -1)))
    fast = tokcompile.optimize(model, args, method=fixed, budget=Tokens(4), where=[0], outputs="reduced")
    index = next(iter(fast(*args).kept.values()))[0].tolist()
    assert index == sorted(WHOLE.tolist().index(i) for i in kept)


@pytest.mark.parametrize("order", [torch.tensor([0, 1, 2, 3] * 3), torch.tensor([4, 7])], ids=["repeats", "few"])
def test_tokens_picked_twice_or_one_by_one_are_refused(order):
    model, args = tiny(Order(order))
    with pytest.raises(tokcompile.UnsupportedGraph, match="few tokens, or some of them twice, by position"):
        tokcompile.optimize(model, args, method="random", where=[0])


@pytest.mark.every(3)
@pytest.mark.parametrize("select", [False, True], ids=["index", "index_select"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", [torch.arange(6), torch.tensor([7, 2, -1, 4, 0])], ids=["first", "some"])
def test_what_is_not_in_the_order_is_dropped_first(order, batch, select):
    """And where more are kept than it holds, they are behind what is left."""
    model, _ = tiny(Order(order, select and bool((order >= 0).all())))
    args = (torch.randn(batch, LENGTH, WIDTH),)
    check = tokcompile.check(model, args, blocks=[0])
    assert check.ok, str(check)
    assert not any(r.note for r in check.results if r.oracle != "copies"), str(check)
    for k in (3, LENGTH - 2):
        fast = tokcompile.optimize(model, args, method="random", budget=Tokens(k), where=[0], outputs="reduced")
        index = next(iter(fast(*args).kept.values()))
        assert index.shape == (batch, min(k, len(order)))
        assert index.max() < len(order)
        assert fast.report.cut_off == batch * (LENGTH - len(order))
