"""Equations of einsum are written out: the same value, every axis named."""

import pytest
import torch

from tests.passes.graphs import canonical
from tokcompile.passes.equations import written_out

CASES = {
    "...d,de->...e": ([(2, 3, 4), (4, 5)], "abd,de->abe"),
    "... d , d e": ([(2, 3, 4), (4, 5)], "abd,de->abe"),
    "...ij,...jk": ([(2, 3, 4), (7, 2, 4, 5)], "bij,abjk->abik"),
    "i...->...": ([(4, 2, 3)], "iab->ab"),
    "a...,b...->ab...": ([(2, 3), (4, 3)], "ac,bc->abc"),
    "ba": ([(2, 3)], "ba->ab"),
    "i,i": ([(4,), (4,)], "i,i->"),
    "...,...->...": ([(2, 1), (2, 3)], "ab,ab->ab"),
}


@pytest.mark.parametrize("equation", CASES)
def test_every_axis_gets_a_letter(equation):
    shapes, want = CASES[equation]
    operands = [torch.randn(shape) for shape in shapes]
    assert written_out(equation, [len(shape) for shape in shapes]) == want
    assert torch.equal(torch.einsum(want, *operands), torch.einsum(equation, *operands))


def test_graphs_hold_them_written_out():
    x, w = torch.randn(2, 3, 4), torch.randn(4, 5)
    gm = canonical(lambda x, w: torch.einsum("...d,de", x, w), x, w)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    assert node.args[0] == "abd,de->abe"
    assert torch.equal(gm(x, w)[0], torch.einsum("...d,de", x, w))
