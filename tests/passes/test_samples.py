"""Samples of a batch are reduced each by itself, in whatever order a model lays samples and heads."""

import functools

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import build, error, run
from tests.models import shake
from tests.models.family import seeded
from tests.shared import shared

WIDTH, HEADS, LENGTH = 24, 3, 17


class Attention(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order, self.qkv, self.out = order, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, HEADS, -1)
        if self.order == "heads, samples":  # on one axis, and the softmax written out
            q, k, v = qkv.permute(2, 3, 0, 1, 4).reshape(3, HEADS * b, n, -1)
            y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            return self.out(y.view(HEADS, b, n, -1).permute(1, 2, 0, 3).reshape(b, n, WIDTH))
        lead = (2, 3, 0, 1, 4) if self.order == "heads first" else (2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.permute(*lead))
        return self.out((y.permute(1, 2, 0, 3) if self.order == "heads first" else y.transpose(1, 2)).reshape(b, n, WIDTH))


class Model(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.attention, self.up = (nn.ModuleList(m() for _ in range(3)) for m in (lambda: Attention(order), self.linear))

    @staticmethod
    def linear():
        return nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for attention, up in zip(self.attention, self.up):
            x = x + attention(x)
            x = x + up(x).relu()
        return x.mean(1)


def each_by_itself(model, x, axis=0, **options):
    together = run(tokcompile.optimize(model, (x,), budget=0.5, **options), x)
    alone = tokcompile.optimize(model, (x.narrow(axis, 0, 1),), budget=0.5, **options)
    for i, sample in enumerate(x.split(1, axis)):
        assert error(together[i : i + 1], run(alone, sample)) < 1e-5


@functools.cache
def made(kind, order, *shape):
    """(model, x)"""
    with seeded():
        return shared(shake(kind(order).eval())), torch.randn(*shape, LENGTH, WIDTH)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("order", "method", "batch"),
    [
        *((order, "tome", batch) for order in ("samples first", "heads first", "heads, samples") for batch in (2, HEADS)),
        ("heads first", "topk", HEADS),
        ("heads, samples", "dart", HEADS),
        ("heads first", "pitome", 2),
    ],
)
def test_heads_are_not_taken_for_samples(batch, order, method):
    each_by_itself(*made(Model, order, batch), method=method)


@pytest.mark.parametrize("name", ["encoder_sequence_first", "encoder_batch_first"])
def test_every_sample_has_its_own_sizes_in_a_mean(name):
    model, (x,), _ = build(f"torch/{name}", 3)
    each_by_itself(model, x, method="tome")


def test_heads_in_another_order_are_refused():
    class Odd(Attention):
        def forward(self, x):  # heads 0 and 2 of a sample, then those of the next; then heads 1
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).reshape(3, b * HEADS, n, -1)[:, order]
            y = ((q @ k.mT).softmax(-1) @ v)[back]
            return self.out(y.view(b, HEADS, n, -1).transpose(1, 2).reshape(b, n, WIDTH))

    pairs = torch.arange(2 * HEADS).view(2, HEADS)
    order = torch.cat([pairs[:, ::2].flatten(), pairs[:, 1]])
    back = order.argsort()
    model = Model("samples first")
    model.attention = nn.ModuleList(Odd("") for _ in range(3))
    model.eval()
    with pytest.raises(tokcompile.UnsupportedGraph, match="which samples and heads"):
        tokcompile.optimize(model, (torch.randn(2, LENGTH, WIDTH),), method="tome", recover="anywhere")


class Windowed(Model):
    """Windows along the batch (RF-DETR's backbone), of which the second block sees all of an image side by side."""

    def forward(self, x):
        b, w, n, _ = x.shape
        x = x.flatten(0, 1)
        for i, (attention, up) in enumerate(zip(self.attention, self.up)):
            y = attention(x.reshape(b, w * n, -1)).view(b * w, n, -1) if i == 1 else attention(x)
            x = x + y
            x = x + up(x).relu()
        return x.mean(1).view(b, w, -1)


@pytest.mark.every(3)
@pytest.mark.parametrize("method", ["tome", "dart", "pitome", "divprune", "grid"])
@pytest.mark.parametrize("order", ["samples first", "heads first"])
def test_windows_side_by_side_in_a_batch(method, order):
    options = {"where": [1]} if method == "dart" else {}
    each_by_itself(*made(Windowed, order, 3, 4), method=method, **options)


@pytest.mark.parametrize("order", ["samples first", "heads first"])
def test_both_oracles_with_windows_in_a_batch(order):
    model, x = made(Windowed, order, 3, 4)
    check = tokcompile.check(model, (x,))
    assert check.ok
    assert not any("recover='anywhere'" in r.note for r in check.results)


class Depths(Model):
    """Features of all depths are added up (DeepStack), those of all tiles of a prompt in a line behind a token of text."""

    def forward(self, x):
        start = self.up[0].bias.expand(x.shape[0], 1, -1)
        line, tiles = torch.zeros(x.shape[0], 1 + x.shape[1] * LENGTH, WIDTH), x.flatten(0, 1)
        for attention, up in zip(self.attention, self.up):
            tiles = tiles + attention(tiles)
            added = line[:, 1:].flatten(0, 1) + up(tiles).flatten(0, 1)
            line = torch.cat([start, added.view(x.shape[0], -1, WIDTH)], 1)
        return line[:, 1:].view(x.shape).mean(2).flatten(0, 1)


@pytest.mark.parametrize("prompts", [1, 2])
def test_tiles_of_prompts_that_were_reduced_more_than_once(prompts):
    model, x = made(Depths, "samples first", prompts, 2)
    options = dict(method="tome", budget=0.5, where=[0, 1])
    together = run(tokcompile.optimize(model, (x,), **options), x)
    tiles = x.flatten(0, 1)[:, None, None]
    alone = tokcompile.optimize(model, (tiles[0],), **options)
    assert error(together, torch.cat([run(alone, tile) for tile in tiles])) < 1e-5
