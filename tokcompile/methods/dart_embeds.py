"""DART before the language model: pivots and similarities on its input embeddings, as TensorRT-Edge-LLM has it."""

from __future__ import annotations

import torch

from tokcompile.errors import MethodError
from tokcompile.methods.dart import pick
from tokcompile.primitives import gather_rows, identity, top_k
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import once


def plan(tokens: Tokens, site: Site) -> Keep:
    """Pivots are the embeddings of largest L1 norm, among the image's and among all text's, also that before the image."""
    pivots, text_pivots = site.options["pivots"], site.options["text_pivots"]
    if pivots < 1 or text_pivots < 0:
        raise MethodError(
            f"dart_embeds takes at least one pivot and no negative number of text pivots, not {pivots} and {text_pivots}"
        )
    if site.k == site.n:
        return Keep(identity(tokens.x))
    own = top_k(tokens.x.float().abs().sum(-1), min(pivots, site.k))
    rows, text = gather_rows(tokens.x, own), tokens.text_embeds
    count = 0 if text is None else min(text_pivots, text.shape[1])
    if text is not None and count:
        norm = text.float().abs().sum(-1)
        norm = norm if tokens.text_seen is None else norm * tokens.text_seen
        rows = torch.cat([rows, gather_rows(text, top_k(norm, count))], 1)
    return Keep(pick(own, rows, tokens.x, site.k))


DART_EMBEDS = register_method(
    Recipe(
        "dart_embeds",
        plan,
        taps=("x", "text_embeds", "text_seen"),
        place="block",
        steps=once(1 / 6, language=0),
        options={"pivots": 4, "text_pivots": 4},
        together=anywhere,
        paper="DART (arXiv 2502.11494), the variant on embeddings in NVIDIA/TensorRT-Edge-LLM",
    )
)
