"""Taken apart and put together again: one view, or nothing at all."""

import pytest
import torch

from tests.passes.graphs import canonical, ops

X = torch.randn(3, 4, 5)


@pytest.mark.parametrize(("fn", "left"), [
    (lambda x: torch.cat(x.unbind(0), 0) * 2, ["flatten.using_ints"]),
    (lambda x: torch.stack(x.unbind(1), 1) * 2, []),
    (lambda x: torch.cat(x.split(2, 1), 1) * 2, []),
    (lambda x: x.split([3])[0] * 2, []),
], ids=["cat of unbind", "stack of unbind", "cat of split", "one piece"])  # fmt: skip
def test_rejoined(fn, left):
    gm = canonical(fn, X)
    assert ops(gm) == [*left, "mul.Tensor"]
    assert torch.equal(gm(X)[0], fn(X))


@pytest.mark.parametrize("fn", [
    lambda x: torch.cat(x.unbind(0)[::-1], 0),
    lambda x: torch.cat(x.unbind(0)[:2], 0),
    lambda x: torch.cat(x.unbind(1), 0),
    lambda x: torch.stack(x.unbind(0), 1),
    lambda x: torch.cat(x.split(2, 1), 0),
], ids=["reversed", "some", "other axis", "stacked elsewhere", "joined elsewhere"])  # fmt: skip
def test_left_alone(fn):
    gm = canonical(fn, X)
    assert len(ops(gm)) > 1
    assert torch.equal(gm(X)[0], fn(X))
