"""ToMe: merge the most similar pairs of even and odd tokens (Bolya et al., ICLR 2023)."""

from __future__ import annotations

import torch

from tokcompile.primitives import complement, first_argmax, gather_rows, identity, top_k, unit
from tokcompile.recipe import Keep, Merge, Recipe, Site, Tokens, register_method
from tokcompile.steps import every_block


def plan(tokens: Tokens, site: Site) -> Keep | Merge:
    """The n - k even tokens most like an odd one join it; even and odd count from the start of the whole sequence."""
    assert tokens.k is not None
    if site.k == site.n:
        return Keep(identity(tokens.x))
    metric = unit(tokens.k.float().mean(1))
    even = site.prefix % 2  # where the first even token of the sequence lies among the reducible ones
    a, b = metric[:, even::2], metric[:, 1 - even :: 2]
    removed, left = site.n - site.k, a.shape[1] - (site.n - site.k)
    scores = a @ b.transpose(1, 2)
    best = scores.amax(-1)
    if site.prefix:
        sources = top_k(best, removed)
        kept = complement(sources, a.shape[1])
    else:  # the published order without a class token, on which the next block's even and odd depend
        sources, kept = top_k(best, a.shape[1]).split([removed, left], 1)
    partner = first_argmax(gather_rows(scores, sources))
    odd = identity(b) * 2 + (1 - even)
    index = torch.cat([kept * 2 + even, odd], 1) if left else odd
    return Merge(index, sources * 2 + even, partner + left)


TOME = register_method(
    Recipe(
        "tome",
        plan,
        taps=("x", "k"),
        steps=every_block(),
        track_size=True,
        proportional=True,
        options={"proportional": True},
        least=lambda n, options: n - n // 2,
        together=lambda site: (site.prefix > 0, site.prefix % 2),
        paper="Token Merging: Your ViT But Faster, arXiv 2210.09461",
    )
)
