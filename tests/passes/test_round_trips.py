"""What is moved there and back is a view, and nothing else is."""

import torch

from tests.passes.graphs import canonical
from tokcompile.passes.graph import packet


def permutes(fn, x):
    gm = canonical(fn, x)
    assert torch.equal(gm(x)[0], fn(x))
    return [packet(n) for n in gm.graph.nodes if "permute" in packet(n)]


def test_there_and_back():
    x = torch.randn(2, 12, 5)
    there = lambda x: (x * 2).view(2, 2, 3, 2, 1, 5).permute(0, 5, 1, 2, 3, 4).reshape(2, 5, 12)  # noqa: E731
    assert not permutes(lambda x: there(x).permute(0, 2, 1).reshape(24, 5) + 1, x)
    assert len(permutes(lambda x: there(x).permute(0, 2, 1).reshape(24, 5) + there(x).sum(), x)) == 1


def test_another_order_stays():
    x = torch.randn(1, 12, 5)
    assert permutes(lambda x: (x * 2).view(4, 3, 5).permute(1, 0, 2).reshape(12, 5) + 1, x)
