"""FastV: the image tokens that the last token of the prompt attends to most (Chen et al., ECCV 2024)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest attention from the last token in the layer before, mean over heads."""
    assert tokens.last_attention is not None
    return Keep(keep_best(tokens.last_attention.float().mean(1), site.k))


FASTV = register_method(
    Recipe(
        "fastv",
        plan,
        taps=("x", "last_attention"),
        place="block",
        steps=once(1 / 6, language=2),
        together=anywhere,
        paper="An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764",
    )
)
