"""DivPrune: the most diverse tokens, each far from all the others kept (CVPR 2025)."""

from __future__ import annotations

import torch

from tokcompile.primitives import ascending, cosine, farthest_points, first_argmax, identity
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def plan(tokens: Tokens, site: Site) -> Keep:
    """Greedy max-min cosine distance, beginning with the token most distant from its nearest neighbour."""
    if site.k == site.n:
        return Keep(identity(tokens.x))
    distance = 1 - cosine(tokens.x, tokens.x)
    neighbour = torch.topk(distance, 2, dim=-1, largest=False).values[..., 1]  # the smallest is the token itself
    return Keep(ascending(farthest_points(distance, first_argmax(neighbour), site.k)))


DIVPRUNE = register_method(
    Recipe(
        "divprune",
        plan,
        place="block",
        steps=once(1 / 6),
        together=anywhere,
        paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175",
    )
)
