"""VTC-CLS: the tokens that the class token attends to most over the later layers of a vision tower (Wang et al., 2024)."""

from __future__ import annotations

from tokcompile.primitives import keep_best
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block, layer_of


def plan(tokens: Tokens, site: Site) -> Keep:
    """The k tokens of largest class attention, mean over heads, summed from the first layer that counts to the one whose
    output these tokens are."""
    assert tokens.earlier_cls_attention is not None
    return Keep(keep_best(tokens.earlier_cls_attention.float().sum(1), site.k))


VTC_CLS = register_method(
    Recipe(
        "vtc_cls",
        plan,
        taps=("x", "earlier_cls_attention"),
        place="block",
        earlier=lambda depth, options: layer_of("vtc_cls", depth, options["layer"]),
        steps=last_block(),
        options={"layer": 2 / 3},
        together=anywhere,
        paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv 2412.05819",
    )
)
