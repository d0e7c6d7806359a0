"""HiPrune: anchors of a middle layer with their neighbours, and the registers of a deep one (Liu et al., 2025)."""

from __future__ import annotations

from math import isqrt

import torch

from tokcompile.errors import MethodError
from tokcompile.primitives import constant, identity, keep_best, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block, layer_of


def neighbours(site: Site) -> list[int]:
    """Steps in the raster to the tokens around an anchor; above and below only where a row's length is known."""
    width = site.grid[-1] if site.grid is not None else isqrt(site.n)
    known = site.grid is not None or width * width == site.n
    return [0, -1, 1, -width, width] if known else [0, -1, 1]


def plan(tokens: Tokens, site: Site) -> Keep:
    """round(k alpha / 5) anchors get most attention in the middle layer; they and their neighbours are kept, and of the
    others those that get most in the layer before."""
    assert tokens.earlier_attention is not None
    assert tokens.received_attention is not None
    if not 0 <= site.options["alpha"] <= 1:
        raise MethodError(f"hiprune's alpha is a share from 0 to 1, not {site.options['alpha']}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    deep = tokens.received_attention.float().mean(1)
    count = round(site.k * site.options["alpha"] / 5)
    if count:
        anchors = top_k(tokens.earlier_attention.float().mean(1), count)
        steps = constant(neighbours(site), anchors)
        around = (anchors[..., None] + steps).clamp(0, site.n - 1).flatten(1)  # past the ends: the first or last token
        deep = deep + torch.zeros_like(deep).scatter(1, around, 2.0)  # attention is below 1: these come first
    return Keep(keep_best(deep, site.k))


HIPRUNE = register_method(
    Recipe(
        "hiprune",
        plan,
        taps=("x", "earlier_attention", "received_attention"),
        place="block",
        # 1/3 of 24 is the published block 8, of 12 block 4
        earlier=lambda depth, options: layer_of("hiprune", depth, options["layer"]),
        steps=last_block(),
        options={"alpha": 0.1, "layer": 1 / 3},
        together=anywhere,
        paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in VLMs, arXiv 2508.00553",
    )
)
