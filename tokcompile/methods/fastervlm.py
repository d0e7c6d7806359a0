"""FasterVLM: the tokens that the class token attends to most at the end of a vision tower (Zhang et al., 2024)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest class attention, mean over heads, in the layer whose output these tokens are."""
    assert tokens.cls_attention is not None
    return Keep(keep_best(tokens.cls_attention.float().mean(1), site.k))


FASTERVLM = register_method(
    Recipe(
        "fastervlm",
        plan,
        taps=("x", "cls_attention"),
        place="block",
        steps=last_block(),
        together=anywhere,
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv 2412.01818",
    )
)
