"""PyramidDrop: fewer image tokens stage by stage, ranked as the next layer will attend (Xing et al., CVPR 2025)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import int_of_first, stages


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest attention from the last token in the layer that follows, mean over heads."""
    assert tokens.last_attention is not None
    return Keep(keep_best(tokens.last_attention.float().mean(1), site.k))


PYRAMIDDROP = register_method(
    Recipe(
        "pyramiddrop",
        plan,
        taps=("x", "last_attention"),
        place="block",
        ahead=True,
        renumber=lambda step, options: True,
        steps=stages(rate=int_of_first),
        together=anywhere,
        paper="PyramidDrop: Accelerating Your LVLMs via Pyramid Visual Redundancy Reduction, arXiv 2410.17247",
    )
)
