"""Random pruning, the baseline that every method has to beat."""

from __future__ import annotations

import random

import torch

from tokcompile.primitives import constant
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import stages


@torch.compiler.assume_constant_result
def draw(n: int, k: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(n), k))


def plan(tokens: Tokens, site: Site) -> Keep:
    """The same seeded draw for every input, another one at every step and for every sample of the batch; segments of one
    sequence draw alike."""
    samples = [row // site.segments for row in range(tokens.x.shape[0])]
    seeds = [site.options["seed"] * 7919 + site.step * 101 + b for b in samples]
    return Keep(constant([draw(site.n, site.k, seed) for seed in seeds], tokens.x))


RANDOM = register_method(
    Recipe(
        "random",
        plan,
        language_place="block",
        steps=stages(),
        options={"seed": 0},
        together=anywhere,
        paper="baseline: a seeded uniform draw",
    )
)
