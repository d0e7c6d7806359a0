"""SparseVLM: text tokens that look at the image rate it; the best of the dropped tokens are recycled (ICML 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, density_peaks, gather_rows, identity, keep_best, members, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, register_method
from tokcompile.steps import stages


def recycled(dropped: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """Of so many dropped tokens, how many are looked at again and how many new ones are made of them."""
    if not options["recycle"] or not dropped:
        return 0, 0
    again = min(dropped, int(options["recycle"] * dropped) + 1)
    return again, min(again, int(again / options["per_cluster"]) + 1)


def kept(n: int, k: int, options: Mapping[str, Any]) -> int:
    """How many tokens stay as they are so that with the recycled ones there are k; fewer than one if that cannot be."""
    return max((c for c in range(k + 1) if c + recycled(n - c, options)[1] <= k), default=0)


def least(n: int, options: Mapping[str, Any]) -> int:
    return min(n, 1 + recycled(n - 1, options)[1])


def raters(tokens: Tokens, site: Site) -> Tensor:
    """The weight of each text token after the image: equal for those that get more than the mean share when every image
    token shares itself out over the text, by the product of their input embeddings: (B, T); (B, 1) where no text is."""
    if tokens.text_embeds is None or tokens.embeds is None or not site.text or site.text[-1][0] < site.start + site.n:
        return torch.ones(tokens.x.shape[0], 1, device=tokens.x.device)
    before = sum(stop - start for start, stop in site.text if start < site.start + site.n)
    rating = tokens.embeds.float() @ tokens.text_embeds[:, before:].float().transpose(1, 2)
    if tokens.text_seen is None:
        share = rating.softmax(-1).mean(1)
        seen, mean = torch.ones_like(share), share.mean(-1, keepdim=True)
    else:
        seen = tokens.text_seen[:, before:].expand(rating.shape[0], -1)
        share = torch.where(seen[:, None] > 0, rating, -1e30).softmax(-1).mean(1)
        mean = share.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    chosen = (share > mean).float() * seen
    chosen = torch.where(chosen.amax(-1, keepdim=True) > 0, chosen, seen)  # all equal: then no one is above the mean
    return chosen / chosen.sum(-1, keepdim=True)


def plan(tokens: Tokens, site: Site) -> Keep:
    """The tokens that the raters attend to most; clusters of the best dropped ones, at the end, are their means."""
    assert tokens.text_attention is not None
    options = site.options
    if not 0 <= options["recycle"] <= 1 or options["per_cluster"] < 1:
        raise MethodError(
            f"sparsevlm recycles a share from 0 to 1, at least one token per cluster, not {options['recycle']} and "
            f"{options['per_cluster']}"
        )
    if site.k == site.n:
        return Keep(identity(tokens.x))
    score = (raters(tokens, site)[:, None] @ tokens.text_attention.float().mean(1))[:, 0]
    if not options["recycle"]:
        return Keep(keep_best(score, site.k))
    count = kept(site.n, site.k, options)
    again, clusters = recycled(site.n - count, options)
    order = top_k(score, count + again)
    stay, second = ascending(order[:, :count]), order[:, count:]
    centres, slots = density_peaks(gather_rows(tokens.x, second), clusters, clusters)
    inside = members(slots, clusters)
    weights = torch.zeros_like(inside[..., :1]).expand(-1, -1, site.n)
    weights = weights.scatter(2, second[:, None].expand(-1, clusters, -1), inside / inside.sum(-1, keepdim=True))
    return Keep(torch.cat([stay, second.gather(1, centres)], 1), ordered=False, extra=weights)


SPARSEVLM = register_method(
    Recipe(
        "sparsevlm",
        plan,
        taps=("x", "text_attention", "embeds", "text_embeds", "text_seen"),
        place="block",
        steps=stages(3 / 32, 7 / 32, 16 / 32),
        renumber=lambda step, options: bool(options["recycle"]),  # as its first version; the second one keeps positions
        options={"recycle": 0.3, "per_cluster": 10},
        least=least,
        paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417",
    )
)
