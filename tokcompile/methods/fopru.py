"""FoPru: the tokens, or the whole rows of patches, that receive most attention (Jiang et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, gather_rows, identity, keep_best, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def keep_rows(score: Tensor, rows: int, columns: int, k: int) -> Tensor:
    """The rows of largest sum; where k is no multiple of a row, the best tokens of the next row fill it up: (B, k)."""
    ramp = torch.arange(columns, device=score.device)
    order = top_k(score.unflatten(1, (rows, columns)).sum(-1), -(-k // columns))  # the last one may be kept in part
    positions = (order[..., None] * columns + ramp).flatten(1)
    full = k // columns * columns
    parts = [positions[:, :full]]
    if k > full:
        part = positions[:, full:]
        parts.append(gather_rows(part, top_k(gather_rows(score, part), k - full)))
    return ascending(torch.cat(parts, 1))


def plan(tokens: Tokens, site: Site) -> Keep:
    """Significance is the attention received in the layer before, mean over heads and queries; kept in raster order."""
    assert tokens.received_attention is not None
    strategy = site.options["strategy"]
    if strategy not in ("rank", "row"):
        raise MethodError(f"fopru's strategy is 'rank' or 'row', not {strategy!r}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    score = tokens.received_attention.float().mean(1)
    if strategy == "rank":
        return Keep(keep_best(score, site.k))
    if site.grid is None or len(site.grid) != 2 or site.grid[0] * site.grid[1] != site.n:
        raise MethodError(f"fopru's row strategy needs the patch grid, and these {site.n} tokens are not a whole one")
    return Keep(keep_rows(score, *site.grid, site.k))


FOPRU = register_method(
    Recipe(
        "fopru",
        plan,
        taps=("x", "received_attention"),
        place="block",
        steps=last_block(),
        options={"strategy": "rank"},
        together=anywhere,
        paper="FoPru: Focal Pruning for Efficient Large Vision-Language Models, arXiv 2411.14164",
    )
)
