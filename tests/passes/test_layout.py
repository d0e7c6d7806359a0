"""What a graph demands of the tokens is learnt in few tries, however many windows it has; windows alike are one batch."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tokcompile
from tests.models.family import seeded
from tests.shared import shared
from tokcompile import UnsupportedGraph, compiler
from tokcompile.passes.layout import Layout, NeedsLayout, with_layout
from tokcompile.passes.reduction import ReductionModule
from tokcompile.recipe import Keep, Recipe, get_method


class Windows(nn.Module):
    """Each window attends to itself; cut out by one split, or by slices."""

    def __init__(self, lengths, sliced):
        super().__init__()
        self.lengths, self.sliced = lengths, sliced
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for _ in range(2):
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            y = torch.cat([scaled_dot_product_attention(*w) for w in zip(*map(self.windows, (q, k, v)))], 2)
            x = x + self.proj(y.transpose(1, 2).flatten(2))
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
    model, x = shared(Windows([8, 4, 8, 4, 8, 8], sliced).eval()), torch.randn(2, 40, 16)
    made = tokcompile.optimize(model, (x,), method="random", where=[0], budget=0.5)
    assert [(r.prefix, r.n, r.k) for r in made.plan.reductions] == [
        (0, 8, 4), (8, 4, 2), (12, 8, 4), (20, 4, 2), (24, 8, 4), (32, 8, 4),
    ]  # fmt: skip
    assert len(tries) == 2
    monkeypatch.undo()
    assert tokcompile.check(model, (x,)).ok


@pytest.mark.parametrize(
    "cut", [lambda x: x[:, 3:], lambda x: torch.cat([x.new_zeros(1, 5, 16), x[:, 3:]], 1)], ids=["off", "on"]
)
def test_pieces_are_those_of_the_sequence_whatever_stands_before_when_it_is_cut(cut):
    class Prefixed(Windows):
        def forward(self, x):
            tokens = super().forward(torch.cat([x.new_zeros(1, 3, 16), x], 1))
            return cut(tokens).split([n for n in (self.first, 10, 20) if n], 1)

    model = Prefixed([33], False)
    model.head, model.first = nn.Identity(), cut(torch.zeros(1, 33, 16)).shape[1] - 30
    made = tokcompile.optimize(
        model.eval(), (torch.randn(1, 30, 16),), method="random", where=[0], spans=[(3, 33)], outputs="reduced"
    )
    assert [(r.prefix, r.n, r.k) for r in made.plan.reductions] == [(3, 10, 5), (13, 20, 10)]


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


# -- windows alike are reduced together --------------------------------------------------------------------------------


@functools.cache
def alike(batch):
    """(model, x)"""
    with seeded():
        return shared(Windows([8, 8, 8, 4, 4, 8], False).eval()), torch.randn(batch, 40, 16)


def batches(made):
    """How many windows each reduction takes, and of how many tokens."""
    modules = [m for m in made.graph_module.modules() if isinstance(m, ReductionModule)]
    return [(m.site.segments, m.site.n) for m in modules]


@pytest.mark.every(3)
@pytest.mark.parametrize(("outputs", "batch"), [("keep", 2), ("reduced", 1)])
@pytest.mark.parametrize("method", ["divprune", "evit", "grid", "pitome", "random", "tome", "topk"])
def test_windows_alike_are_reduced_as_one_batch(method, outputs, batch):
    """As if each were reduced by itself, with the same plan; the second block reduces further what the first one left."""
    model, x = alike(batch)
    alone = replace(get_method(method), together=None)
    one, many = (
        tokcompile.optimize(model, (x,), method=m, where=[0, 1], budget=0.5, outputs=outputs, **dict(recover="anywhere"))
        for m in (get_method(method), alone)
    )
    assert one.plan == many.plan
    assert one.report.flops == many.report.flops
    together = [(1, 8), (2, 8)] if method == "tome" else [(3, 8)]  # which orders tokens otherwise where nothing stands before
    assert batches(one)[: len(batches(one)) // 2] == [*together, (2, 4), (1, 8)]
    assert len(batches(many)) == 12
    for _ in range(2):
        for a, b in zip(torch.utils._pytree.tree_leaves(one(x)), torch.utils._pytree.tree_leaves(many(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        x = torch.randn(batch, 40, 16)


def test_a_plan_that_does_not_say_so_sees_one_window_at_a_time():
    seen = []

    def plan(tokens, site):
        seen.append((len(tokens.x), site.prefix, tokens.whole.x.shape[1]))
        return Keep(tokens.x[..., 0].topk(site.k).indices, ordered=False)

    x = torch.randn(2, 24, 16)
    made = tokcompile.optimize(Windows([8, 8, 8], False).eval(), (x,), method=Recipe("mine", plan), where=[0], budget=0.5)
    seen.clear()
    made(x)
    assert seen == [(2, 0, 24), (2, 8, 20), (2, 16, 16)]


def test_each_window_draws_what_it_draws_by_itself():
    """Random selection is seeded by the sample and not by the row of the batch."""
    x = torch.randn(2, 24, 16)
    made = tokcompile.optimize(
        Windows([8, 8, 8], False).eval(), (x,), method="random", where=[0], budget=0.5, outputs="reduced"
    )
    first, second, third = (v for v in torch.utils._pytree.tree_leaves(made(x)) if v.dtype == torch.int64)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first[0], first[1])


def test_a_file_of_windows_has_one_node_for_those_alike(tmp_path):
    model, x = alike(1)
    made = tokcompile.optimize(model, (x,), method="divprune", where=[0], budget=0.5)
    report = made.export_onnx(tmp_path / "m.onnx")
    assert [row["shape"][0] for row in report.reductions][:2] == [3, 2]
