"""Top-K: the tokens that the class token attends to most (Haurum et al., ICCV Workshops 2023)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import int_of_first, stages


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest class attention, mean over heads; of received attention where no class token is."""
    assert tokens.cls_attention is not None
    return Keep(keep_best(tokens.cls_attention.float().mean(1), site.k))


TOPK = register_method(
    Recipe(
        "topk",
        plan,
        taps=("cls_attention",),
        steps=stages(rate=int_of_first),
        together=anywhere,
        paper="Which Tokens to Use? Investigating Token Reduction in Vision Transformers, arXiv 2308.04657",
    )
)
