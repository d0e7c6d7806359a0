"""DART: a few pivot tokens and, for each, the tokens that duplicate it least (EMNLP 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, cosine, gather_rows, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def quotas(total: int, pivots: int) -> list[int]:
    """How many tokens each pivot picks: ceil(what is left / pivots left)."""
    picks = []
    for left in range(pivots, 0, -1):
        picks.append(-(-total // left))
        total -= picks[-1]
    return picks


def pick(pivots: Tensor, rows: Tensor, x: Tensor, k: int) -> Tensor:
    """The pivots and, for each row in turn, its share of the free tokens least like it: pivots: (B, p), rows: (B, P, D),
    x: (B, n, D) -> (B, k), ascending."""
    similar = cosine(rows, x)
    taken = torch.zeros_like(similar[:, 0]).scatter(1, pivots, float("-inf"))
    kept = [pivots]
    for r, quota in enumerate(quotas(k - pivots.shape[1], rows.shape[1])):
        if quota:
            kept.append(top_k(taken - similar[:, r], quota))
            taken = taken.scatter(1, kept[-1], float("-inf"))
    return ascending(torch.cat(kept, 1))


def text_after(site: Site) -> tuple[int, list[tuple[int, int]]]:
    """How many pivots come from text, and from where: after the image alone."""
    spans = [span for span in site.text if span[0] >= site.start + site.n]
    return min(site.options["text_pivots"], sum(stop - start for start, stop in spans)), spans


def text_pivots(tokens: Tokens, site: Site) -> Tensor | None:
    """The text tokens after the image whose keys have the largest L1 norm: their rows of `normed`, (B, pivots, D)."""
    count, spans = text_after(site)
    if not count:
        return None
    assert tokens.whole is not None
    keys, normed = tokens.whole.rotated_k, tokens.whole.normed
    assert keys is not None
    assert normed is not None
    norm = torch.cat([keys[:, :, start:stop] for start, stop in spans], 2).float().abs().sum((1, 3))
    return gather_rows(torch.cat([normed[:, start:stop] for start, stop in spans], 1), top_k(norm, count))


def plan(tokens: Tokens, site: Site) -> Keep:
    """Pivots are the keys of largest L1 norm, among the image's and the text's after it; each in turn picks the least
    similar image tokens that are still free. Image pivots come first, each group by falling norm."""
    assert tokens.rotated_k is not None
    assert tokens.normed is not None
    if site.options["pivots"] < 1 or site.options["text_pivots"] < 0:
        raise MethodError(
            f"dart takes at least one pivot and no negative number of text pivots, not {site.options['pivots']} and "
            f"{site.options['text_pivots']}"
        )
    count = min(site.options["pivots"], site.k)
    pivots = top_k(tokens.rotated_k.float().abs().sum((1, 3)), count)
    rows, text = gather_rows(tokens.normed, pivots), text_pivots(tokens, site)
    if text is not None:
        rows = torch.cat([rows, text], 1)
    return Keep(pick(pivots, rows, tokens.normed, site.k))


DART = register_method(
    Recipe(
        "dart",
        plan,
        taps=("x", "normed", "rotated_k"),
        place="block",
        steps=once(1 / 6, language=2),
        options={"pivots": 4, "text_pivots": 4},
        together=anywhere,
        paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494",
    )
)
