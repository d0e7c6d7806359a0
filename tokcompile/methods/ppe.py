"""PPE: clusters of look-alikes, each a token that keeps the positions of several of its members (ICLR 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import density_peaks, identity, members
from tokcompile.recipe import Keep, Mix, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def neighbour_count(n: int, k: int, step: int) -> int:
    """Of how many nearest tokens the density is, as published: fewer in the later stages of a cascade."""
    published = 5 if step == 0 else 3
    return min(n, published if k >= published else min(3, max(k // 2, 1)))


def last_members(inside: Tensor, count: int) -> Tensor:
    """The last members of each cluster by index, backwards, over and over where it has fewer: inside: (B, k, n), ones and
    zeros -> (B, k, count)."""
    n = inside.shape[2]
    order = torch.topk(inside * torch.arange(1, n + 1, device=inside.device), min(count, n), dim=-1).indices
    turn, size = torch.arange(count, device=inside.device).float(), inside.sum(-1, keepdim=True)
    return order.gather(2, (turn - size * (turn / size).floor()).to(torch.int64))


def plan(tokens: Tokens, site: Site) -> Keep | Mix:
    """Means of k clusters by density peaks, best centre first; a first reduction gives each several positions, later ones
    the whole set of positions of its last member."""
    positions, sections = site.options["positions"], site.options["sections"]
    if positions < 1:
        raise MethodError(f"ppe gives each token at least one position, not {positions}")
    if sections is not None and not (
        isinstance(sections, (tuple, list)) and all(isinstance(s, int) and s > 0 for s in sections)
    ):
        raise MethodError(f"ppe's sections are how many frequencies each axis has, such as (16, 24, 24), not {sections!r}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    _, slots = density_peaks(tokens.x, site.k, neighbour_count(site.n, site.k, site.step))
    inside = members(slots, site.k)
    many = last_members(inside, positions if site.step == 0 else 1)
    return Mix(many[..., 0], inside / inside.sum(-1, keepdim=True), many if many.shape[2] > 1 else None)


PPE = register_method(
    Recipe(
        "ppe",
        plan,
        place="block",
        steps=last_block(language=0),
        options={"positions": 8, "sections": None},
        together=anywhere,
        paper="Positional Preservation Embedding for Token Compression in Multimodal Large Language Models, arXiv 2510.22936",
    )
)
