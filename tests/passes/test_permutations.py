"""Orders of all tokens that follow from sizes among the inputs are fixed."""

import pytest
import torch

import tokcompile
from tests.passes.graphs import canonical
from tokcompile.passes.canonicalise import FIXED


def unshuffled(x, sizes):
    """2 x 2 patches as one token, wherever the rows of a grid of these sizes put them."""
    width = sizes[0, 1]
    token = torch.arange(6)
    rows = (token // (width // 2) * 2)[:, None, None] + torch.arange(2)[:, None]
    columns = (token % (width // 2) * 2)[:, None, None] + torch.arange(2)
    return x.flatten(0, 1)[(rows * width + columns).flatten(1)].flatten(1)


def test_an_order_that_follows_from_sizes_is_fixed():
    x, sizes = torch.randn(1, 24, 3), torch.tensor([[4, 6]])
    gm = canonical(unshuffled, x, sizes)
    (index,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.index.Tensor]
    assert index.args[1][0].op == "get_attr"
    assert torch.equal(gm(x, sizes)[0], unshuffled(x, sizes))
    (fixed,) = gm.meta[FIXED]
    fixed.check((x, sizes))
    with pytest.raises(tokcompile.InputError, match="all 24 tokens are taken in an order of their own"):
        fixed.check((x, torch.tensor([[6, 4]])))


@pytest.mark.parametrize("order", ["drawn", "some", "mask"])
def test_other_orders_stay_what_they_are(order):
    def pick(x, ids, noise):
        index = {"drawn": noise.argsort(), "some": ids.argsort()[:3], "mask": ids > 0}[order]
        return x[index]

    inputs = torch.randn(5, 3), torch.tensor([3, 1, 4, 2, 5]), torch.randn(5)
    gm = canonical(pick, *inputs)
    assert not gm.meta[FIXED]
    assert torch.equal(gm(*inputs)[0], pick(*inputs))
