"""HoloV: a budget for each stretch of the image, spent on its most attended tokens (Zou et al., NeurIPS 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, constant, identity, top_k, unit
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block

EPS = 1e-6


def chunks(n: int, groups: int) -> list[range]:
    """Contiguous runs of at least two tokens, the first n mod groups of them one token longer than the others."""
    groups = max(1, min(groups, n // 2))
    edges = [i * (n // groups) + min(i, n % groups) for i in range(groups + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:])]


def chunk_scores(x: Tensor, attention: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """Mean attention, and the variance of similarities brought to its scale: x: (B, G, m, D), attention: (B, G, m) -> (B, G).

    valid: (G, m), ones and zeros. A token's similarity to itself counts as zero, in the mean and in the variance, as published.
    """
    size = valid.sum(-1)
    rows = unit(x)
    other = valid[:, None] * (1 - torch.eye(valid.shape[1], device=x.device))
    similar = rows @ rows.transpose(-1, -2) * other
    mean = similar.sum(-1) / (size - 1)[:, None]
    variance = ((similar - mean[..., None]) ** 2 * valid[:, None]).sum(-1) / (size - 1)[:, None]
    level = (attention * 1000 * valid).sum(-1) / size
    spread = (variance * valid).sum(-1) / size
    return level + alpha * spread * level / (spread + EPS)


def allot(score: Tensor, k: int) -> Tensor:
    """Shares of k in proportion to score: (B, G), rounded down; what is left goes to the largest, one each: (B, G)."""
    share = score / (score.sum(-1, keepdim=True) + EPS)
    count = (share * k).floor()
    order = top_k(share, share.shape[1])
    rank = torch.zeros_like(order).scatter(1, order, identity(share))
    return count + (rank < k - count.sum(-1, keepdim=True))


def plan(tokens: Tokens, site: Site) -> Keep:
    """Each chunk keeps its most attended tokens; what a chunk is too small to use goes to the best of all others."""
    assert tokens.cls_attention is not None
    if site.options["groups"] < 1:
        raise MethodError(f"holov needs at least one group, not {site.options['groups']}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    runs = chunks(site.n, site.options["groups"])
    longest = len(runs[0])
    table = constant([[*run, *[run[0]] * (longest - len(run))] for run in runs], tokens.x)
    valid = constant([[1.0] * len(run) + [0.0] * (longest - len(run)) for run in runs], tokens.x)
    score = tokens.cls_attention.float().mean(1)
    order = top_k(score, site.n)
    rank = torch.zeros_like(order).scatter(1, order, identity(score))  # 0 for the most attended token

    def chunked(value: Tensor) -> Tensor:
        return value.index_select(1, table.flatten()).unflatten(1, table.shape)

    count = allot(chunk_scores(chunked(tokens.x), chunked(score), valid, site.options["alpha"]), site.k)
    ranks = chunked(rank)
    within = ((ranks[..., None, :] < ranks[..., None]) * valid[:, None]).sum(-1)
    inside = constant([g * longest + i for g, run in enumerate(runs) for i in range(len(run))], tokens.x)
    chosen = (within < count[..., None]).flatten(1).index_select(1, inside)
    return Keep(ascending(top_k(chosen * site.n - rank, site.k)))


HOLOV = register_method(
    Recipe(
        "holov",
        plan,
        taps=("x", "cls_attention"),
        place="block",
        steps=last_block(),
        options={"groups": 16, "alpha": 0.09},
        together=anywhere,
        paper="Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention, arXiv 2510.02912",
    )
)
