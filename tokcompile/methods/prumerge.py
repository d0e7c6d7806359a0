"""PruMerge+: attended tokens and an even grid of others, each fused with its nearest keys (Shang et al., ICCV 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import constant, gather_rows, identity, top_k, unit
from tokcompile.recipe import Keep, Mix, Recipe, Site, Tokens, register_method
from tokcompile.steps import last_block


def all_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H * d), float32."""
    return x.float().transpose(1, 2).flatten(2)


def attention(tokens: Tokens, site: Site) -> Tensor:
    """How the class token attends with all heads as one of width C: softmax(q k / sqrt(C)) (B, n); without one, the mean
    over all queries, in a language model over those of the image."""
    source = tokens.whole if tokens.whole is not None and not site.text else tokens
    assert source.q is not None
    assert source.k is not None
    q = source.q[:, :, :1] if site.prefix and source is tokens.whole else source.q
    k = source.k if source.k.shape[1] == q.shape[1] else source.k.repeat_interleave(q.shape[1] // source.k.shape[1], 1)
    q, k = all_heads(q), all_heads(k)
    rows = (q @ k.transpose(1, 2) * k.shape[-1] ** -0.5).softmax(-1).mean(1)
    return rows.narrow(1, site.start if source is tokens.whole else 0, site.n)


def grid_positions(n: int, count: int) -> list[int]:
    """Every step-th position from half a step on: of 576 and 72 these are 4, 12, ..., 572, as published."""
    step = n // max(count, 1)
    return [step // 2 + i * step for i in range(count)]


def plan(tokens: Tokens, site: Site) -> Keep | Mix:
    """Each kept token adds its nearest neighbours times their attention; the last token is the same sum over all dropped."""
    assert tokens.k is not None
    share, neighbours = site.options["grid"], site.options["neighbours"]
    if not 0 <= share <= 1 or neighbours < 1:
        raise MethodError(f"prumerge takes a grid share from 0 to 1 and at least one neighbour, not {share} and {neighbours}")
    if site.k == site.n:
        return Keep(identity(tokens.x))
    weight = attention(tokens, site)
    even = constant(grid_positions(site.n, int((site.k - 1) * share + 0.5)), weight).long()  # which may be none
    even = even.expand(weight.shape[0], -1)
    best = top_k(weight.scatter(1, even, float("-inf")), site.k - even.shape[1])
    kept = torch.cat([best[:, :-1], even], 1)  # by attention, then the grid: the published order
    metric = unit(all_heads(tokens.k))
    similar = (gather_rows(metric, kept) @ metric.transpose(1, 2)).scatter(2, kept[..., None], float("-inf"))
    nearest = top_k(similar, min(neighbours, site.n - 1))
    near = torch.zeros_like(similar).scatter(2, nearest, 1.0) * weight[:, None]
    rest = weight.scatter(1, kept, 0.0)[:, None]
    return Mix(torch.cat([kept, best[:, -1:]], 1), torch.cat([near.scatter(2, kept[..., None], 1.0), rest], 1))


PRUMERGE = register_method(
    Recipe(
        "prumerge",
        plan,
        taps=("x", "q", "k"),
        place="block",
        steps=last_block(),
        options={"grid": 0.5, "neighbours": 32},
        least=lambda n, options: min(n, 2),
        paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv 2403.15388",
    )
)
