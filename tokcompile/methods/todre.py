"""ToDRE, its stage after the vision encoder: the tokens of largest distances to each other (Li et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, cosine, farthest_points, first_argmax, gather_rows, identity
from tokcompile.recipe import Keep, Recipe, Site, Tokens, register_method
from tokcompile.steps import last_block


def first_pick(tokens: Tokens, site: Site, distance: Tensor) -> Tensor:
    """The token least similar to the class token; without one, the most distant from its nearest neighbour: (B,)."""
    if site.prefix and not site.text and tokens.whole is not None:
        return first_argmax(-cosine(tokens.whole.x[:, :1], tokens.x)[:, 0])
    return first_argmax(torch.topk(distance, 2, dim=-1, largest=False).values[..., 1])


def largest_sums(distance: Tensor, seed: Tensor, k: int) -> Tensor:
    """Greedy max-sum: each step takes the token with the largest sum of distances to all picked ones; like
    `farthest_points` otherwise."""
    picks = [seed]
    total = torch.zeros_like(distance[:, 0])
    for _ in range(k - 1):
        last = picks[-1][:, None]
        total = (total + gather_rows(distance, last)[:, 0]).scatter(1, last, float("-inf"))
        picks.append(first_argmax(total))
    return torch.stack(picks, dim=1)


def plan(tokens: Tokens, site: Site) -> Keep:
    """Cosine distance: the second version of the paper maximises sums of them, the first the smallest one (k-center)."""
    spread = {"sum": largest_sums, "min": farthest_points}.get(site.options["objective"])
    if spread is None:
        raise MethodError(f"todre's objective is 'sum' or 'min', not {site.options['objective']!r}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    distance = 1 - cosine(tokens.x, tokens.x)
    return Keep(ascending(spread(distance, first_pick(tokens, site, distance), site.k)))


TODRE = register_method(
    Recipe(
        "todre",
        plan,
        place="block",
        steps=last_block(),
        options={"objective": "sum"},
        paper="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, arXiv 2505.18757",
    )
)
