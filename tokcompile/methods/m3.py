"""M3: the patch grid averaged to a coarser one, for models trained with it and as a baseline (Cai et al., ICLR 2025)."""

from __future__ import annotations

import torch

from tokcompile.methods.grid import raster, sub_grid
from tokcompile.primitives import constant, identity
from tokcompile.recipe import Keep, Mix, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def cells(n: int, parts: int) -> list[range]:
    """n positions in contiguous parts, as equal as possible."""
    return [range(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


def pools(site: Site) -> list[list[int]]:
    """What each new token averages: an r x c = k cut of the patch grid where k allows one, else k runs in raster order."""
    if whole := raster(site):
        rows, columns = whole
        if found := sub_grid(rows, columns, site.k):
            return [[r * columns + c for r in y for c in x] for y in cells(rows, found[0]) for x in cells(columns, found[1])]
    return [list(run) for run in cells(site.n, site.k)]


def plan(tokens: Tokens, site: Site) -> Keep | Mix:
    """Means over the cells of a grid of exactly k; the token in the middle lends its position."""
    if site.k == site.n:
        return Keep(identity(tokens.x))
    parts, (batch, n, _) = pools(site), tokens.x.shape
    owner = {j: i for i, part in enumerate(parts) for j in part}
    slots = constant([owner[j] for j in range(n)], tokens.x)
    member = (slots == torch.arange(site.k, device=slots.device)[:, None]).float()
    middle = constant([part[(len(part) - 1) // 2] for part in parts], tokens.x)
    return Mix(middle.expand(batch, -1), (member / member.sum(-1, keepdim=True)).expand(batch, -1, -1))


M3 = register_method(
    Recipe(
        "m3",
        plan,
        place="block",
        steps=last_block(language=0),
        options={"shape": None},
        together=anywhere,
        paper="Matryoshka Multimodal Models, arXiv 2405.17430",
    )
)
