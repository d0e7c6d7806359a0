"""PiToMe: merge inside clusters of look-alikes and protect the tokens that stand alone (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu

from tokcompile.errors import MethodError
from tokcompile.primitives import first_argmax, gather_rows, identity, top_k, unit
from tokcompile.recipe import Keep, Merge, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import every_block, same_share

# which variant the first and the second half of the blocks use; B pairs all tokens by rank, P only the most redundant
VARIANTS = {"deit": "BP", "mae": "PB", "P": "PP", "B": "BB"}


def variant(site: Site) -> str:
    if site.options["variant"] not in VARIANTS:
        raise MethodError(f"pitome's variant is one of {', '.join(VARIANTS)}, not {site.options['variant']!r}")
    return VARIANTS[site.options["variant"]][site.block >= (site.depth + 1) // 2]


def energy(metric: Tensor, margin: float, alpha: float) -> Tensor:
    """Mean over all tokens of ELU(cosine - margin): high inside a large cluster; metric: (B, n, d) -> (B, n)."""
    return elu(metric @ metric.transpose(1, 2) - margin, alpha).mean(-1)


def plan(tokens: Tokens, site: Site) -> Keep | Merge:
    """Ranked by energy, tokens of even rank join the most similar one of odd rank."""
    assert tokens.k is not None
    if site.k == site.n:
        return Keep(identity(tokens.x))
    metric = unit(tokens.k.float().mean(1))
    margin = site.options["margin"] * (1 - site.block / site.depth)
    order = top_k(energy(metric, margin, site.options["alpha"]), site.n)
    removed = site.n - site.k
    paired = 2 * removed if variant(site) == "P" else site.n
    a, b = order[:, 0:paired:2], order[:, 1:paired:2]
    scores = gather_rows(metric, a) @ gather_rows(metric, b).transpose(1, 2)
    if paired == 2 * removed:
        sources, kept = a, order[:, paired:]
    else:
        ranked = top_k(scores.amax(-1), a.shape[1])
        sources, kept = gather_rows(a, ranked).split([removed, a.shape[1] - removed], 1)
        scores = gather_rows(scores, ranked[:, :removed])
    return Merge(torch.cat([kept, b], 1), sources, first_argmax(scores) + kept.shape[1])


PITOME = register_method(
    Recipe(
        "pitome",
        plan,
        taps=("x", "k"),
        steps=every_block(same_share),
        track_size=True,
        proportional=True,
        options={"margin": 0.75, "alpha": 1.0, "variant": "deit", "proportional": False},
        least=lambda n, options: n - n // 2,
        together=anywhere,
        paper="Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv 2405.16148",
    )
)
