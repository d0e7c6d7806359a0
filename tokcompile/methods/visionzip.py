"""VisionZip: the most attended tokens, and contextual ones that gather the others (Yang et al., CVPR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.errors import MethodError
from tokcompile.primitives import ascending, complement, first_argmax, gather_rows, identity, top_k, unit
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def contextual_count(site: Site) -> int:
    """The published pairs 53 + 10, 107 + 20 and 161 + 30 are this share of k, rounded."""
    if not 0 <= site.options["contextual"] <= 1:
        raise MethodError(f"visionzip's contextual is a share between 0 and 1, not {site.options['contextual']}")
    return int(site.k * site.options["contextual"] + 0.5)


def gather_weights(metric: Tensor, targets: Tensor, free: Tensor) -> Tensor:
    """Each token of `free`: (B, n), ones and zeros, joins the target most like it in metric: (B, n, d); targets: (B, c).

    Returns weights (B, c, n): the target itself plus, as in the authors' code, the mean over those that joined it.
    """
    slots = first_argmax(metric @ gather_rows(metric, targets).transpose(1, 2))
    joined = (slots[:, None] == torch.arange(targets.shape[1], device=slots.device)[:, None]) * free[:, None]
    return (joined / joined.sum(-1, keepdim=True).clamp_min(1)).scatter(2, targets[..., None], 1.0)


def plan(tokens: Tokens, site: Site) -> Keep:
    """The dominant tokens have the largest class attention; of the rest, every step-th one gathers its look-alikes by key."""
    assert tokens.cls_attention is not None
    assert tokens.k is not None
    if site.k == site.n:
        return Keep(identity(tokens.x))
    count = contextual_count(site)
    score = tokens.cls_attention.float().sum(1)
    order = top_k(score, site.k - count)
    if not count:
        return Keep(ascending(order))
    rest = complement(order, site.n)
    targets = rest[:, :: rest.shape[1] // count][:, :count]
    index = torch.cat([ascending(order), targets], 1)
    free = torch.ones_like(score).scatter(1, index, 0.0)
    weights = gather_weights(unit(tokens.k.float().mean(1)), targets, free)
    return Keep(index, ordered=False, extra=weights)


VISIONZIP = register_method(
    Recipe(
        "visionzip",
        plan,
        taps=("x", "cls_attention", "k"),
        place="block",
        steps=last_block(),
        options={"contextual": 10 / 64},
        together=anywhere,
        paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467",
    )
)
