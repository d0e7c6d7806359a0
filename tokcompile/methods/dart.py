"""DART: a few pivot tokens and, for each, the tokens that duplicate it least (EMNLP 2025)."""

from __future__ import annotations

import torch

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, cosine, gather_rows, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, register_method
from tokcompile.steps import once


def quotas(total: int, pivots: int) -> list[int]:
    """How many tokens each pivot picks: ceil(what is left / pivots left)."""
    picks = []
    for left in range(pivots, 0, -1):
        picks.append(-(-total // left))
        total -= picks[-1]
    return picks


def plan(tokens: Tokens, site: Site) -> Keep:
    """Pivots are the keys of largest L1 norm; each in turn picks the least similar tokens that are still free."""
    assert tokens.k is not None
    assert tokens.normed is not None
    if site.options["pivots"] < 1:
        raise MethodError(f"dart takes at least one pivot, not {site.options['pivots']}")
    count = min(site.options["pivots"], site.k)
    pivots = top_k(tokens.k.float().abs().sum((1, 3)), count)
    similar = cosine(gather_rows(tokens.normed, pivots), tokens.normed)  # (B, pivots, n)
    taken = torch.zeros_like(similar[:, 0]).scatter(1, pivots, float("-inf"))
    kept = [pivots]
    for r, quota in enumerate(quotas(site.k - count, count)):
        if quota:
            kept.append(top_k(taken - similar[:, r], quota))
            taken = taken.scatter(1, kept[-1], float("-inf"))
    return Keep(ascending(torch.cat(kept, 1)))


DART = register_method(
    Recipe(
        "dart",
        plan,
        taps=("x", "normed", "k"),
        place="block",
        steps=once(1 / 6),
        options={"pivots": 4},
        paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494",
    )
)
