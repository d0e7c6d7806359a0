"""Residual streams kept as a grid (B, H, W, C) run over one token axis, with the same values."""

import pytest
import torch
from torch import nn

from tests.conftest import build, export, leaves, run
from tests.passes.graphs import canonical, ops
from tokcompile.compiler import analyse
from tokcompile.passes.find import find
from tokcompile.passes.flatten import flatten_grids, flatten_projector, flatten_tiles
from tokcompile.passes.graph import propagate_shapes, shape

D = 16


class Windows(nn.Module):
    """Two blocks over a (B, 4, 6, 16) grid with attention in windows of 2 x 3; what is special is passed in."""

    def __init__(self, positions=None, between=None, channels_first=False):
        super().__init__()
        self.between, self.channels_first = between, channels_first
        self.positions = nn.Parameter(torch.randn(positions)) if positions else None
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def attend(self, x, qkv):
        b = x.shape[0]
        x = x.view(b, 2, 2, 2, 3, D).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 6, D)
        q, k, v = qkv(x).view(b * 4, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 2, 2, 2, 3, D)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 6, D)

    def forward(self, x):
        if self.positions is not None:
            x = x + self.positions
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            x = x + self.attend(self.norms[2 * i](x), qkv)
            x = x + mlp(self.norms[2 * i + 1](x)).relu()
            if self.between is not None:
                x = self.between(x)
        return x.permute(0, 3, 1, 2) if self.channels_first else x


GRID = torch.randn(3, 4, 6, D, generator=torch.Generator().manual_seed(0))


def smooth(x):
    return x + nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)


CASES = {
    "plain": {},
    "positions": dict(positions=(1, 4, 6, D)),
    "positions-along-one-side": dict(positions=(1, 1, 6, D)),
    "positions-along-the-other": dict(positions=(4, 1, D)),
    "scale-per-channel": dict(positions=(D,)),
    "output-as-feature-map": dict(channels_first=True),
    "convolution-between": dict(between=smooth),
    "shift-between": dict(between=lambda x: x.roll((1, 1), (1, 2))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_grid_becomes_one_token_axis(name):
    model = Windows(**CASES[name]).eval()
    with torch.no_grad():
        want = model(GRID)
    gm = canonical(model, GRID)
    before = find(gm)
    assert [shape(b.mid) for b in before.blocks] == [(3, 4, 6, D)] * 2
    assert flatten_grids(gm, before)
    propagate_shapes(gm, [GRID])
    gm.recompile()
    after = find(gm)
    assert [(b.stage.length, b.token_axis, b.batch_axis, b.why_not) for b in after.blocks] == [(24, 1, 0, None)] * 2
    got = run(gm, GRID)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert "layer_norm.default" in ops(gm)


def test_a_sequence_is_left_alone():
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    gm = canonical(model, torch.randn(2, 12, D))
    code = str(gm.graph)
    assert not flatten_grids(gm, find(gm))
    assert str(gm.graph) == code


def test_feature_maps_are_left_alone():
    """Channels are not on the last axis: these are no rows of tokens."""
    analysis = analyse(export("timm/visformer"), None, None)
    assert {len(shape(b.mid)) for b in analysis.structure.blocks} == {4}


@pytest.mark.parametrize(("name", "lengths"), [("timm/samvit", [49] * 4), ("timm/swin", [196, 196, 49, 49]),
                                               ("hf/vitdet", [49] * 4)])  # fmt: skip
def test_window_models(name, lengths):
    analysis = analyse(export(name, 3), None, None)
    assert [b.stage.length for b in analysis.structure.blocks] == lengths
    assert all(b.why_not is None and len(shape(b.mid)) == 3 for b in analysis.structure.blocks)
    got = leaves(run(analysis.graph, *analysis.traced.inputs))
    for g, w in zip(got, build(name, 3)()):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5)


class Projector(nn.Module):
    """Neighbours of 2 x 2 on the channels, then a gated projector on the grid; `end` lays it out."""

    def __init__(self, end, dim=-1):
        super().__init__()
        self.dim, self.end, self.norm, self.up, self.down = dim, end, nn.LayerNorm(4 * D), nn.Linear(4 * D, 8), nn.Linear(4, 5)

    def forward(self, x):
        b, h, w, d = x.shape
        x = x.reshape(b, h, w // 2, 2 * d).transpose(1, 2).reshape(b, w // 2, h // 2, 4 * d).transpose(1, 2)
        x, gate = self.up(self.norm(x)).chunk(2, self.dim)
        return self.end(self.down(nn.functional.silu(gate) * x))


@pytest.mark.parametrize("dim", [-1, 3])
@pytest.mark.parametrize("end", [lambda x: x.flatten(1, 2), lambda x: x.reshape(-1, 5)])
def test_a_projector_on_a_grid_runs_over_one_token_axis(end, dim):
    model = Projector(end, dim).eval()
    gm = canonical(model, GRID)
    assert flatten_projector(gm, find(gm))
    propagate_shapes(gm, [GRID])
    gm.recompile()
    assert {len(shape(n)) for n in gm.graph.nodes if "linear" in n.name or "layer_norm" in n.name} == {3}
    assert torch.equal(run(gm, GRID)[0], model(GRID))


@pytest.mark.parametrize("end", [lambda x: x, lambda x: x.mean(1), lambda x: x.permute(0, 3, 1, 2), lambda x: x.flatten(0, 1)])
def test_a_grid_that_something_looks_at_stays(end):
    gm = canonical(Projector(end).eval(), GRID)
    code = str(gm.graph)
    assert not flatten_projector(gm, find(gm))
    assert str(gm.graph) == code


class Tiles(nn.Module):
    """Attention over all tokens of two tiles, which are seen as tiles where each gets its own embedding; `then` is done to
    them in between."""

    def __init__(self, then=lambda x: x):
        super().__init__()
        self.then, self.table, self.qkv = then, nn.Parameter(torch.randn(1, 2, 1, D)), nn.Linear(D, 3 * D)

    def attend(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        x = self.attend(x.flatten(1, 2))
        x = self.then(x.view(len(x), 2, 12, D) + self.table) * 2
        return self.attend(x.reshape(len(x), 24, D))


def test_tiles_that_are_seen_for_an_embedding_stay_one_token_axis():
    model = Tiles().eval()
    want = model(GRID)
    gm = canonical(model, GRID)
    assert flatten_tiles(gm, find(gm))
    propagate_shapes(gm, [GRID])
    gm.recompile()
    assert not flatten_tiles(gm, find(gm))
    assert {len(shape(n)) for n in gm.graph.nodes if n.name.startswith(("add", "mul"))} == {3}
    assert torch.equal(run(gm, GRID)[0], want)


@pytest.mark.parametrize("then", [
    lambda x: x + x.mean(2, keepdim=True), lambda x: x.flip(2), lambda x: x.softmax(1), nn.PReLU(2),
])  # fmt: skip
def test_tiles_that_something_looks_at_stay(then):
    gm = canonical(Tiles(then).eval(), GRID)
    code = str(gm.graph)
    assert not flatten_tiles(gm, find(gm))
    assert str(gm.graph) == code
