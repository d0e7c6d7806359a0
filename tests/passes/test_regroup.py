"""Towers that rearrange their grid, against loops over rows and columns: the order that is found, and what becomes of it."""

import functools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import (
    avg_pool2d,
    interpolate,
    layer_norm,
    one_hot,
    pixel_unshuffle,
    scaled_dot_product_attention,
    unfold,
)  # fmt: skip

import tokcompile
from tests.conftest import error, run
from tests.shared import shared
from tokcompile import Tokens, UnsupportedGraph
from tokcompile.compiler import analyse
from tokcompile.passes.find import find
from tokcompile.passes.graph import packet, shape
from tokcompile.passes.layout import Layout
from tokcompile.passes.memory import ancestors_of
from tokcompile.passes.regroup import form_of, regroup
from tokcompile.passes.tokens import Seq, Space
from tokcompile.passes.tokens import regroup as cut_anew

D = 16


class Attend(nn.Module):
    """Attention and an MLP."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(x).relu()


class Tower(nn.Module):
    """Blocks over h x w patches behind `first` class tokens, a movement, and blocks over what it gives."""

    def __init__(self, end, h, w, first=0, width=D):
        super().__init__()
        self.patch, self.end, self.first = nn.Conv2d(3, D, 2, 2), end, first
        self.extra, self.place = nn.Parameter(torch.randn(1, first, D)), nn.Parameter(torch.randn(1, first + h * w, D))
        self.vision = nn.Sequential(Attend(D), Attend(D))
        self.project, self.language = nn.Linear(width, D), nn.Sequential(Attend(D), Attend(D))

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        if self.first:
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        x = self.vision(x + self.place)
        return self.language(self.project(self.end(x)))


def grid(x, h, w):
    return x.reshape(len(x), h, w, -1)


def shuffle(h, w, r, s, first=0):
    """Groups of r x s as InternVL and Idefics make them: two views and two permutations."""

    def end(x):
        x = grid(x[:, first:], h, w)
        b = len(x)
        x = x.reshape(b, h, w // s, s * D).permute(0, 2, 1, 3).reshape(b, w // s, h // r, r * s * D).permute(0, 2, 1, 3)
        return x.reshape(b, -1, r * s * D)

    return end


def members(h, w, r, s, columns_first=False):
    """The tokens of each group of r x s, one row each, by loops."""
    out = []
    for i in range(0, h, r):
        for j in range(0, w, s):
            cells = [(i + a, j + b) for a in range(r) for b in range(s)]
            out.append([y * w + x for y, x in (sorted(cells, key=lambda c: (c[1], c[0])) if columns_first else cells)])
    return out


def unfolded(h, w, r, s):
    return lambda x: unfold(grid(x, h, w).permute(0, 3, 1, 2), (r, s), stride=(r, s)).transpose(1, 2)


def pooled(h, w, r, s):
    return lambda x: avg_pool2d(x.transpose(1, 2).reshape(len(x), D, h, w), (r, s)).flatten(2).transpose(1, 2)


def adaptive(h, w, r, s):
    pool = nn.AdaptiveAvgPool2d((h // r, w // s))
    return lambda x: pool(x.transpose(1, 2).reshape(len(x), D, h, w)).flatten(2).transpose(1, 2)


def strided(h, w):
    """Four strided slices joined along the channels: columns first."""

    def end(x):
        x = grid(x, h, w)
        return torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)

    return end


def unshuffled(h, w, r):
    return lambda x: pixel_unshuffle(grid(x, h, w).permute(0, 3, 1, 2), r).flatten(2).transpose(1, 2)


def folded(h, w, r, s):
    """One view and one permutation of six axes."""
    return lambda x: x.view(len(x), h // r, r, w // s, s, D).permute(0, 1, 3, 2, 4, 5).contiguous().view(len(x), -1, r * s * D)


def averaged(h, w, r, s):
    return lambda x: x.view(len(x), h // r, r, w // s, s, D).mean((2, 4)).flatten(1, 2)


def halved(h, w):
    pool = dict(scale_factor=0.5, mode="bilinear")
    return lambda x: interpolate(grid(x, h, w).permute(0, 3, 1, 2), **pool).flatten(2).transpose(1, 2)


def weighted(h, w, r, s):
    """Which row each token is added to, as weights."""
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    weights = one_hot(row // r * (w // s) + column // s).T / (r * s)
    return lambda x: weights.expand(len(x), -1, -1) @ x


def normed(h, w, r, s):
    """Groups that are a norm away from being joined."""
    order = torch.tensor(members(h, w, r, s)).flatten()

    def end(x):
        x = x[:, order].view(len(x), -1, r * s, D)
        return layer_norm(x, (D,)).view(len(x), -1, r * s * D)

    return end


def attended(h, w, r, s):
    """Groups that an index picks, whose members see each other."""
    order = torch.tensor(members(h, w, r, s)).flatten()

    def end(x):
        x = x[:, order].view(len(x), -1, r * s, D)
        return scaled_dot_product_attention(x, x, x).flatten(2)

    return end


CASES = {
    "shuffle": (shuffle(6, 4, 2, 2), 6, 4, 0, members(6, 4, 2, 2), 1),
    "shuffle behind a class token": (shuffle(4, 6, 2, 2, 1), 4, 6, 1, members(4, 6, 2, 2), 1),
    "three by two behind five": (shuffle(9, 4, 3, 2, 5), 9, 4, 5, members(9, 4, 3, 2), 1),
    "unfold": (unfolded(6, 8, 2, 2), 6, 8, 0, members(6, 8, 2, 2), 1),
    "odd windows": (unfolded(9, 15, 3, 5), 9, 15, 0, members(9, 15, 3, 5), 1),
    "pool": (pooled(8, 4, 2, 2), 8, 4, 0, members(8, 4, 2, 2), 4),
    "pool of 3 x 1": (pooled(9, 3, 3, 1), 9, 3, 0, members(9, 3, 3, 1), 3),
    "adaptive pool": (adaptive(6, 6, 3, 2), 6, 6, 0, members(6, 6, 3, 2), 6),
    "strided slices": (strided(4, 6), 4, 6, 0, members(4, 6, 2, 2, columns_first=True), 1),
    "pixel unshuffle": (unshuffled(4, 6, 2), 4, 6, 0, members(4, 6, 2, 2), 1),
    "six axes": (folded(6, 10, 3, 2), 6, 10, 0, members(6, 10, 3, 2), 1),
    "mean": (averaged(6, 10, 3, 2), 6, 10, 0, members(6, 10, 3, 2), 6),
    "half the size": (halved(6, 4), 6, 4, 0, members(6, 4, 2, 2), 4),
    "weights": (weighted(6, 4, 3, 2), 6, 4, 0, members(6, 4, 3, 2), 6),
    "groups behind a norm": (normed(6, 4, 2, 2), 6, 4, 0, members(6, 4, 2, 2), 1),
    "attention in groups": (attended(6, 4, 2, 2), 6, 4, 0, members(6, 4, 2, 2), 1),
}


@functools.cache
def made(name, batch):
    end, h, w, first, want, mean = CASES[name]
    torch.manual_seed(0)
    model = shared(Tower(end, h, w, first, D * (1 if mean > 1 else len(want[0]))).eval())
    return model, torch.randn(batch, 3, 2 * h, 2 * w), want, mean


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CASES)
def test_the_order_is_that_of_the_groups(name):
    model, image, want, mean = made(name, 2)
    analysis = analyse(model, (image,), None)
    (grouping,) = analysis.groupings
    assert grouping.order.reshape(len(want), -1).tolist() == want
    (exit,) = grouping.exits
    assert (exit.form.unit, exit.form.mean) == (len(want[0]), mean)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_in_group_order_the_model_is_the_same(name):
    """And what is left of the movement is views."""
    model, image, want, _ = made(name, 2)
    analysis = analyse(model, (image,), None)
    graph = regroup(analysis.graph, analysis.structure, analysis.groupings, analysis.traced.inputs)
    assert error(run(graph, image), run(model, image)) < 1e-5
    last = [b for b in find(graph).blocks if b.stage.visual][-1]
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    moves = {"aten.permute", "aten.im2col", "aten.avg_pool2d", "aten.index_select", "aten.pixel_unshuffle", "aten.cat"}
    linear = next(n for n in graph.graph.nodes if packet(n) == "aten.linear" and shape(n)[-2:] == (len(want), D))
    between = [n for n in ancestors_of({linear}) if order[n] > order[last.end]]
    assert not [n for n in between if packet(n) in moves]


@pytest.mark.every(3)
@pytest.mark.parametrize(("name", "batch"), [*((n, 2) for n in CASES), ("shuffle behind a class token", 1), ("pool", 1)])
def test_what_is_kept_are_whole_groups(name, batch):
    """Both oracles, and the blocks behind the movement hold as many tokens as there are groups left."""
    model, image, want, _ = made(name, batch)
    check = tokcompile.check(model, (image,))
    assert check.ok, str(check)
    assert not [r for r in check.results if "recover" in r.note]
    fast = tokcompile.optimize(model, (image,), method="random", budget=Tokens(3), where=[1], outputs="reduced")
    (r,) = fast.plan.reductions
    assert (r.n, r.k, r.unit, r.prefix) == (len(want), 3, len(want[0]), model.first)
    assert [b["left"] for b in fast.report.blocks[2:]] == [3, 3]
    out, kept = run(fast, image)
    assert out.shape == (batch, 3, D)
    assert kept["s0_index"].shape == (batch, 3)
    assert not fast.report.recoveries


@pytest.mark.parametrize("name", ["shuffle behind a class token", "pool", "unfold"])
def test_a_group_that_is_kept_is_what_it_would_be_alone(name):
    """Behind one reduction at the entrance of the language blocks: the same groups, by hand, from the original model."""
    model, image, *_ = made(name, 2)
    fast = tokcompile.optimize(model, (image,), method="random", budget=Tokens(3), where=[1], outputs="reduced")
    out, kept = run(fast, image)
    x = model.patch(image).flatten(2).transpose(1, 2)
    if model.first:
        x = torch.cat([model.extra.expand(2, -1, -1), x], 1)
    first, second = model.vision
    x = first(x + model.place)
    b, n, d = x.shape
    q, k, v = second.qkv(second.norm(x)).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + second.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
    x = model.project(model.end(x + second.mlp(x).relu()))  # the MLP sees each token by itself
    x = model.language(torch.stack([row[index] for row, index in zip(x, kept["s0_index"])]))
    assert error(out, x) < 1e-5


@pytest.mark.parametrize("name", ["shuffle behind a class token", "pool"])
def test_merged_groups(name):
    model, image, want, _ = made(name, 2)
    fast = tokcompile.optimize(model, (image,), method="tome", budget=Tokens(3), outputs="reduced")
    assert all(r.unit == len(want[0]) for r in fast.plan.reductions)
    out, kept = run(fast, image)
    assert out.shape == (2, 3, D)
    assert kept["s1_size"].sum(1).tolist() == [len(want)] * 2


def test_with_all_tokens_the_original_is_untouched():
    model, image, *_ = made("pool", 2)
    same = tokcompile.optimize(model, (image,), method="tome", budget=1.0)
    assert error(run(same, image), run(model, image)) == 0


def test_methods_that_rank_single_tokens_say_so():
    model, image, *_ = made("shuffle", 2)
    with pytest.raises(tokcompile.MethodError, match="aim ranks tokens one by one, and this model keeps them in groups"):
        tokcompile.optimize(model, (image,), method="aim", budget=0.5, where=[1], outputs="reduced")


@pytest.mark.parametrize("end", [
    lambda x: avg_pool2d(x.transpose(1, 2).reshape(len(x), D, 6, 6), 3, 1, 1).flatten(2).transpose(1, 2),  # windows overlap
    lambda x: avg_pool2d(x.transpose(1, 2).reshape(len(x), D, 6, 6), 4).flatten(2).transpose(1, 2),  # some are left out
    lambda x: x.view(len(x), 6, 6, D)[:, :, ::2].flatten(1, 2),
    lambda x: x.view(len(x), 36, 2, D // 2).transpose(1, 2).reshape(len(x), 36, D),  # channels of different tokens
], ids=["overlap", "remainder", "every other", "torn"])  # fmt: skip
def test_what_are_no_groups_is_refused(end):
    torch.manual_seed(0)
    model, image = Tower(end, 6, 6).eval(), torch.randn(1, 3, 12, 12)
    assert not analyse(model, (image,), None).groupings
    with pytest.raises(UnsupportedGraph, match="recover='anywhere'"):
        tokcompile.optimize(model, (image,), method="random", budget=0.5, where=[1], outputs="reduced")


@st.composite
def chains(draw):
    """The sizes of the axes that a grid is cut into, and the order in which they are put."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(sizes) + 1)))  # the last one are the channels
    return sizes, order, draw(st.sampled_from([d for d in range(1, prod(sizes) + 1) if prod(sizes) % d == 0]))


@settings(max_examples=200, deadline=None)
@given(chains())
def test_any_permutation_of_axes(chain):
    """The form says of every entry which token and which channel it is, or there is none where rows are no groups."""
    sizes, order, unit = chain
    n, width = prod(sizes), 4
    moved = torch.arange(n * width).view(*sizes, width).permute(order).reshape(n // unit, unit * width)
    form = form_of(moved[None, ..., None], 1, n, width, 0, n)
    rows = [{int(v) // width for v in row} for row in moved]
    if unit == 1 or any(len(r) != unit for r in rows):
        assert form is None
        return
    alike = all(
        torch.equal(moved[0] % width, row % width)
        and [moved[0].div(width, rounding_mode="floor").tolist().index(t) for t in (moved[0] // width).tolist()]
        == [(row // width).tolist().index(t) for t in (row // width).tolist()]
        for row in moved
    )
    assert (form is not None) == alike
    if form is not None:
        again = torch.arange(n * width).view(n, width)[form.order].reshape(n // unit, unit * width)
        assert torch.equal(again if form.channels is None else again[:, form.channels], moved)


def test_tokens_one_by_one_are_viewed_as_their_groups():
    groups = Space("s0", 6, 2)
    tokens = Space("s0_x4", 24, 8)
    tokens.groups = groups
    assert cut_anew(((3,), (Seq((tokens,)),), (16,)), (3, 6, 64)) == ((3,), (Seq((groups,)),), (64,))
    assert cut_anew(((3,), (Seq((tokens,)),), (16,)), (3, 6, 4, 16)) == ((3,), (Seq((groups,)),), (4,), (16,))
    with pytest.raises(Exception, match="splits"):
        cut_anew(((3,), (Seq((1, tokens)),), (16,)), (3, 5, 80))


def test_an_analysis_is_regrouped_once():
    model, image, *_ = made("shuffle", 2)
    analysis = analyse(model, (image,), None)
    layout = Layout(4, (), True)
    assert analysis.laid_out(layout) is analysis.laid_out(layout) is not analysis
