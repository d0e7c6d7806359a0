"""What a graph demands of the tokens is learnt in few tries, however many windows it has."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tokcompile
from tokcompile import UnsupportedGraph, compiler
from tokcompile.passes.layout import Layout, NeedsLayout, with_layout


class Windows(nn.Module):
    """Each window attends to itself; cut out by one split, or by slices."""

    def __init__(self, lengths, sliced):
        super().__init__()
        self.lengths, self.sliced = lengths, sliced
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for _ in range(2):
            q, k, v = (t[:, None] for t in self.qkv(self.norm(x)).chunk(3, -1))
            y = torch.cat([scaled_dot_product_attention(*w) for w in zip(*map(self.windows, (q, k, v)))], 2)[:, 0]
            x = x + self.proj(y)
        return self.head(x)

    def windows(self, t):
        if not self.sliced:
            return t.split(self.lengths, 2)
        stops = torch.tensor(self.lengths).cumsum(0).tolist()
        return [t[:, :, stop - length : stop] for stop, length in zip(stops, self.lengths)]


@pytest.mark.parametrize("sliced", [False, True], ids=["split", "slices"])
def test_all_windows_are_found_at_once(sliced, monkeypatch):
    tries = []
    rewrite = compiler.rewrite
    monkeypatch.setattr(compiler, "rewrite", lambda *a: tries.append(1) or rewrite(*a))
    model, x = Windows([8, 4, 8, 4, 8, 8], sliced).eval(), torch.randn(2, 40, 16)
    made = tokcompile.optimize(model, (x,), method="random", where=[0], budget=0.5)
    assert [(r.prefix, r.n, r.k) for r in made.plan.reductions] == [
        (0, 8, 4), (8, 4, 2), (12, 8, 4), (20, 4, 2), (24, 8, 4), (32, 8, 4),
    ]  # fmt: skip
    assert len(tries) == 2
    monkeypatch.undo()
    assert tokcompile.check(model, (x,)).ok


def test_where_no_layout_helps_tokens_are_given_back_on_demand():
    tries = []

    def attempt(layout):
        tries.append(layout)
        if layout.final:
            return "given back"
        raise NeedsLayout(Layout(4), UnsupportedGraph("it tears groups of four apart"))

    assert with_layout(attempt, give_back=True) == "given back"
    assert tries == [Layout(), Layout(4), Layout(final=True)]
    with pytest.raises(UnsupportedGraph, match="groups of four"):
        with_layout(attempt, give_back=False)
