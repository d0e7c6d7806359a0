"""Maps of tiles with newline tokens, written as an order: read off against a model that does it step by step."""

from itertools import accumulate

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import error, run
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.graph import packet
from tokcompile.passes.trace import trace


class Tiles(nn.Module):
    """A base view and rows x columns tiles of 4 x 4 tokens through an encoder, then one map with a newline token a row."""

    def __init__(self, rows, columns, cut=0, cast=False, twice=False):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.tower = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.newline = nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 8)
        self.rows, self.columns, self.cut, self.cast, self.twice = rows, columns, cut, cast, twice

    def forward(self, x):
        x = self.tower(x)
        base, tiles = x[0], x[1:]
        tiles = tiles.view(self.rows, self.columns, 4, 4, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        tiles = tiles[:, self.cut : tiles.shape[1] - self.cut]
        newline = self.newline[:, None, None].expand(*tiles.shape[:2], 1).to(x.dtype)
        tiles = torch.cat([tiles, *[newline] * (2 if self.twice else 1)], -1).flatten(1, 2).T
        return self.head(torch.cat([base, tiles]))


@pytest.mark.every(3)
@pytest.mark.parametrize(("rows", "columns", "more"), [
    (1, 1, {}), (2, 2, {}), (1, 3, {}), (2, 1, {"twice": True}), (2, 1, {"cut": 1}), (2, 2, {"cut": 2}), (1, 2, {"cut": 1}),
])  # fmt: skip
def test_the_map_is_shorter(rows, columns, more):
    """Each kept token of a tile, and every newline token, in the order of the map; of what is cut off, nothing."""
    model, x = Tiles(rows, columns, **more).eval(), torch.randn(1 + rows * columns, 16, 16)
    whole = run(model, x)
    optimized = tokcompile.optimize(model, (x,), method="random", where=[1], budget=tokcompile.Tokens(5), outputs="reduced")
    out, kept = run(optimized, x)
    each = 16 - 4 * more.get("cut", 0) * (2 if rows == 1 else 1)  # of a tile's tokens are on the map
    newlines = whole.shape[0] - 16 - each * rows * columns
    assert out.shape == (5 + min(5, each) * rows * columns + newlines, 8)
    assert not optimized.report.recoveries
    assert optimized.report.cut_off == (16 - each) * rows * columns
    # both layers are behind what is kept: the model itself on the tokens of each view that the indices name
    starts = [0, *accumulate(map(sum, optimized.kept_of.values()))]
    where = torch.cat([kept[name][0] + start for name, start in zip(optimized.kept_of, starts)])
    assert sorted(where.tolist()) == where.tolist()
    fill = run(model.head, model.newline[None])
    assert torch.equal((whole - fill).abs().amax(-1)[where] < 1e-6, (out - fill).abs().amax(-1) < 1e-6)
    again = tokcompile.optimize(model, (x,), method="random", where=[1], budget=tokcompile.Tokens(5))
    assert run(again, x).shape == whole.shape
    assert tokcompile.check(model, (x,)).ok


def test_written_as_an_order_it_is_the_same():
    model, x = Tiles(2, 2).eval(), torch.randn(5, 16, 16)
    flat = trace(model, (x,), {})
    graph = canonicalise(flat.gm, flat.inputs)
    orders = [n for n in graph.graph.nodes if packet(n) == "aten.index_select"]
    assert len(orders) == 1
    assert error(run(graph, x)[0], run(model, x)) == 0


def test_all_that_a_tile_shows_is_left_where_it_is_less_than_the_budget():
    model, x = Tiles(2, 2, cut=3, twice=True).eval(), torch.randn(5, 16, 16)
    whole = run(model, x)
    optimized = tokcompile.optimize(model, (x,), method="random", where=[1], budget=tokcompile.Tokens(5), outputs="reduced")
    assert error(run(optimized, x)[0][5:], whole[16:]) < 1e-6
    assert tokcompile.check(model, (x,)).ok


def test_a_map_that_is_cut_is_an_order_of_some():
    model, x = Tiles(2, 1, cut=1).eval(), torch.randn(3, 16, 16)
    flat = trace(model, (x,), {})
    graph = canonicalise(flat.gm, flat.inputs)
    (order,) = [n for n in graph.graph.nodes if packet(n) == "aten.index_select"]
    assert order.meta["val"].shape == (16 + 2 * 12 + 6, 16)
    assert error(run(graph, x)[0], run(model, x)) == 0


def test_rows_of_two_halves_are_no_mosaic():
    """The second half of each token and the first half of the next one: whole numbers in order, but no token's row."""

    class Shifted(Tiles):
        def forward(self, x):
            rows = self.tower(x).flatten()[8:-8].view(3, -1, 16)
            return self.head(torch.cat([rows, self.newline.expand(3, 1, 16)], 1))

    model, x = Shifted(1, 1).eval(), torch.randn(1, 16, 16)
    traced = trace(model, (x,), None)
    graph = canonicalise(traced.gm, traced.inputs)
    assert "aten.index_select" not in {packet(n) for n in graph.graph.nodes}
    assert error(run(graph, x)[0], run(model, x)) == 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_class_tokens_of_several_samples_are_no_mosaic(batch, after):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 16))

        def forward(self, x):
            pieces = [self.token.expand(x.shape[0], -1, -1), x.view(x.shape[0], 4, 4, 16).flatten(1, 2)]
            return torch.cat(pieces[::-1] if after else pieces, 1) * 2

    traced = trace(Joined().eval(), (torch.randn(batch, 16, 16),), None)
    assert "aten.index_select" not in {packet(n) for n in canonicalise(traced.gm, traced.inputs).graph.nodes}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("windows", [False, True])
def test_a_class_token_beside_a_feature_map_is_no_mosaic(batch, windows):
    """Patches as (B, H, W, C), or in the order of windows: the class token beside them is protected."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.patch, self.norm, self.token = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Parameter(torch.randn(1, 1, 16))
            self.tower = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, image):
            x = self.norm(self.patch(image).permute(0, 2, 3, 1))
            if windows:
                x = x.view(len(x), 2, 2, 2, 2, 16).transpose(2, 3)
            x = x.reshape(len(x), 16, 16)
            return self.tower(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0]

    plan = tokcompile.optimize(Tower().eval(), (torch.randn(batch, 3, 16, 16),), method="topk", where=[0]).plan
    assert [(r.n, r.k, r.prefix, r.suffix) for r in plan.reductions] == [(16, 8, 1, 0)]


def test_samples_one_after_the_other_meet_the_same_as_a_batch():
    """As features that are added inside of a decoder: taken sample by sample there, and all at once here."""

    class Twice(Tiles):
        def forward(self, x):
            x = self.tower(x)
            return self.head(x.flatten(0, 1) + torch.cat([x[0], x[1]]) * 2)

    model, x = Twice(1, 1).eval(), torch.randn(2, 16, 16)
    assert (check := tokcompile.check(model, (x,))).ok, str(check)
    assert not any(r.note for r in check.results), str(check)
    out = run(tokcompile.optimize(model, (x,), method="random", where=[0], budget=tokcompile.Tokens(5), outputs="reduced"), x)
    assert out.output.shape == (10, 8)


def test_a_method_that_reads_all_pairs_gets_the_cut_map_only_with_recovery():
    model, x = Tiles(2, 1, cut=1).eval(), torch.randn(3, 16, 16)
    every = dict(method="aim", where=[1], budget=0.5, outputs="reduced")
    with pytest.raises(tokcompile.UnsupportedGraph, match="it picks some tokens by position"):
        tokcompile.optimize(model, (x,), recover="never", **every)
    given_back = tokcompile.optimize(model, (x,), recover="anywhere", **every)
    assert run(given_back, x).output.shape == run(model, x).shape
    assert given_back.report.recoveries


def test_an_order_of_as_many_tokens_as_channels_is_no_newline_token():
    order = torch.randperm(16)

    class Ordered(nn.Module):
        def forward(self, x):
            return x[order] * 2

    x = torch.randn(16, 16)
    traced = trace(Ordered().eval(), (x,), None)
    assert torch.equal(run(canonicalise(traced.gm, traced.inputs), x)[0], run(Ordered(), x))
