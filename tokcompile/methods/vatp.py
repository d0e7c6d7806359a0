"""VATP: attention from the last token times the size of what it would fetch (Guo et al., EMNLP 2024)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest attention times L1 norm of the value, in the layer before, mean over heads."""
    assert tokens.last_attention is not None
    assert tokens.v is not None
    size = tokens.v.float().abs().sum(-1)  # (B, key heads, n), fewer where queries share them
    size = size.repeat_interleave(tokens.last_attention.shape[1] // size.shape[1], 1)
    return Keep(keep_best((tokens.last_attention.float() * size).mean(1), site.k))


VATP = register_method(
    Recipe(
        "vatp",
        plan,
        taps=("x", "last_attention", "v"),
        place="block",
        steps=once(1 / 6, language=2),
        together=anywhere,
        paper="Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction, arXiv 2406.12335",
    )
)
