"""EViT: keep the attentive tokens and fuse the others into one (Liang et al., ICLR 2022)."""

from __future__ import annotations

from math import ceil

import torch

from tokcompile.primitives import ascending, identity, keep_best, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import stages


def rate_with_fused(n: int, first: int, rate: float, step: int) -> int:
    """ceil(rate * n) kept tokens and the fused one."""
    return min(n, ceil(rate * n) + 1)


def plan(tokens: Tokens, site: Site) -> Keep:
    """The tokens of largest class attention a; the last one is the sum of a_j x_j over all others, as published."""
    assert tokens.cls_attention is not None
    if site.k == site.n:
        return Keep(identity(tokens.x))
    score = tokens.cls_attention.float().mean(1)
    if not site.options["fuse"]:
        return Keep(keep_best(score, site.k))
    order = top_k(score, site.k)
    kept, best_dropped = ascending(order[:, :-1]), order[:, -1:]
    fused = score.scatter(1, kept, 0.0)[:, None]
    return Keep(torch.cat([kept, best_dropped], 1), ordered=False, extra=fused)


EVIT = register_method(
    Recipe(
        "evit",
        plan,
        taps=("x", "cls_attention"),
        steps=stages(rate=rate_with_fused),
        options={"fuse": True},
        least=lambda n, options: min(n, 1 + bool(options["fuse"])),
        together=anywhere,
        paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800",
    )
)
