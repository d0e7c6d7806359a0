"""Products with weights that pool: which tokens each row is the mean of, and what is no such product."""

import pytest
import torch
from torch.nn.functional import one_hot

import tokcompile
from tests.conftest import error
from tests.passes.graphs import canonical
from tokcompile.passes.canonicalise import FIXED
from tokcompile.passes.graph import packet
from tokcompile.passes.pooling import order_of

ROWS = torch.tensor([0, 1, 0, 2, 1, 2])  # which row each of six tokens is added to


def pool(x, places):
    """Padding, at place -1, is zero and counted to the first row."""
    x = x.masked_fill((places < 0)[..., None], 0.0)
    weights = one_hot(places.clamp(min=0), x.shape[1] // 2).to(x.dtype) / 2
    return weights.transpose(1, 2) @ x


def products(gm):
    return [n for n in gm.graph.nodes if packet(n) == "aten.matmul"]


@pytest.mark.parametrize("padding", [0, 2])
def test_a_pooling_by_places_is_written_as_one_and_checked(padding):
    places = torch.cat([ROWS, torch.full((padding,), -1)]).repeat(2, 1)
    x = torch.randn(2, 6 + padding, 4)
    gm = canonical(pool, x, places)
    assert not products(gm)
    assert error(gm(x, places)[0], pool(x, places)) < 1e-6
    (weights, *more) = gm.meta[FIXED]
    assert weights.guard == f"{6 + padding} tokens are pooled to {3 + padding // 2} by where they lie"
    assert len(more) == (padding > 0)
    for one in gm.meta[FIXED]:
        one.check((x, places))
    with pytest.raises(tokcompile.InputError, match="by where they lie"):
        weights.check((x, places.flip(1)))


@pytest.mark.parametrize("places", [[[0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 2, 2]], [[0, 0, 0, 1, 1, 2]] * 2], ids=["rows", "counts"])
def test_samples_or_rows_that_are_not_alike_stay_a_product(places):
    x, places = torch.randn(2, 6, 4), torch.tensor(places)
    gm = canonical(pool, x, places)
    assert len(products(gm)) == 1
    assert not gm.meta[FIXED]


@pytest.mark.parametrize("weights", [
    torch.eye(6), torch.full((3, 6), 1 / 6), one_hot(ROWS).T.float(), torch.tensor([[0.9, 0.1, 0, 0], [0, 0, 0.5, 0.5]]),
    torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]]),
], ids=["order", "everything", "sum", "shares", "overlap"])  # fmt: skip
def test_other_weights(weights):
    assert order_of(weights) is None


def test_padding_fills_the_rows_without_tokens():
    weights = torch.tensor([[0.5, 0, 0.5, 0.5, 0.5, 0], [0, 0.5, 0, 0, 0, 0.5], [0] * 6])
    padding = torch.tensor([0, 0, 0, 1, 1, 0]).bool()[:, None]
    assert order_of(weights) is None
    assert order_of(weights, padding).tolist() == [[0, 2], [1, 5], [3, 4]]
