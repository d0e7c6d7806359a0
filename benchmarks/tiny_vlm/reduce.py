"""What reaches the language model when the vision tower, or what lies between the two, is reduced: features and their cells.

All reductions are made by `tokcompile.optimize`. Those of the tower do not depend on what was trained, and are kept on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import tokcompile
from benchmarks.tiny_vlm.data import GRID, PATCH, Scene
from benchmarks.tiny_vlm.tower import Tower, features, pixels_of
from tokcompile.recipe import Recipe, get_method
from tokcompile.steps import last_block

TOKENS = (28, 57, 14, 85)  # of 256: 89.1, 77.7, 94.5 and 66.8 % removed, in the order in which they are measured
EVEN = (64, 16)  # 8 x 8 and 4 x 4, to which pooling is published
# the methods at each place, by how many tokens they leave
IN_TOWER = ("visionzip", "fastervlm", "prumerge", "tome", "m3", "hiprune", "holov", "fopru", "todre", "random")
TOWER = dict.fromkeys(TOKENS, IN_TOWER) | dict.fromkeys(EVEN, ("m3",))
BETWEEN = dict.fromkeys(TOKENS, ("divprune", "random", "grid")) | dict.fromkeys(EVEN, ("m3", "divprune", "random"))
INSIDE = dict.fromkeys(TOKENS, ("dart", "fastv", "random"))
STEPWISE = dict.fromkeys(TOKENS, ("pyramiddrop", "sparsevlm", "aim"))  # by depth, at the FLOPs of so many tokens at layer 2
LAYER = 2
SMALLER = (8, 6, 4)  # grids of a smaller input: 64, 36 and 16 tokens
BATCH = 8
DRAWN = 32  # scenes a batch where random selection draws another set for each of them


@dataclasses.dataclass
class Reduced:
    """features: (B, k, 384). cells: (B, k), the place of each on the grid of 16 x 16."""

    features: Tensor
    cells: Tensor

    def first(self, count: int) -> Reduced:
        return Reduced(self.features[:count], self.cells[:count])


def full(scenes: Sequence[Scene], folder: Path) -> Reduced:
    def make() -> Reduced:
        made = features(Tower(), list(scenes), BATCH)
        return Reduced(made, torch.arange(GRID * GRID).expand(len(scenes), -1))

    return _kept(folder / "full.pt", make)


def smaller(scenes: Sequence[Scene], grid: int, folder: Path) -> Reduced:
    """A smaller picture through the same tower; each token stands at the middle of what it shows."""

    def make() -> Reduced:
        side = grid * PATCH
        small = [dataclasses.replace(s, pixels=_resized(s, side)) for s in scenes]
        middle = ((torch.arange(grid) + 0.5) * GRID / grid).long()
        cells = (middle[:, None] * GRID + middle[None]).flatten()
        return Reduced(features(Tower(), small, BATCH), cells.expand(len(scenes), -1))

    return _kept(folder / f"smaller-{grid}.pt", make)


@torch.no_grad()
def tower(scenes: Sequence[Scene], method: str, tokens: int, folder: Path) -> Reduced:
    """The tower optimized by a method, at the blocks `in_tower` names; the class token is left out."""
    batch = DRAWN if method == "random" else BATCH

    def make() -> Reduced:
        pixels, budget = pixels_of(list(scenes[:batch])), tokcompile.Tokens(tokens)
        opt = tokcompile.optimize(Tower(), (pixels,), method=in_tower(method), budget=budget, outputs="reduced")
        made, cells = [], []
        for at in range(0, len(scenes), batch):
            with torch.autocast("cpu", torch.bfloat16):
                out = opt(pixels_of(list(scenes[at : at + batch])))
            made.append(out.output[:, 1:].bfloat16())
            cells.append(next(v for name, v in reversed(out.kept.items()) if name.endswith("index")))
        return Reduced(torch.cat(made), torch.cat(cells))

    return _kept(folder / f"tower-{method}-{tokens}.pt", make)


@torch.no_grad()
def between(prompts: Tensor, first_layer: nn.Module, method: str, tokens: int, spans: list[tuple[int, int]]) -> Tensor:
    """The indices (B, k) that a method keeps at the entrance of the language model; prompts: (B, L, D).

    first_layer: the language model cut to one layer: what is kept there does not depend on the others.
    """
    whole = torch.cat([prompts, prompts[: -len(prompts) % DRAWN]]).split(DRAWN)
    opt = tokcompile.optimize(
        tokcompile.llm.Prefill(first_layer),
        kwargs={"inputs_embeds": whole[0]},
        method=at_entrance(method),
        budget=tokcompile.Tokens(tokens),
        where=[0],
        spans=spans,
        outputs="reduced",
    )
    kept = [opt(inputs_embeds=p).kept["s0_index"] for p in whole]
    return torch.cat(kept)[: len(prompts)]


def in_language_model(
    lm: Any, prompt: Tensor, spans: list[tuple[int, int]], method: str | None, tokens: int, layer: int = LAYER
) -> tokcompile.OptimizedModel:
    """The prefill that keeps so many visual tokens from a layer on; methods of several steps reduce at layers of their own, and
    take as many FLOPs. Raises: BudgetError where they cannot."""
    make = partial(
        tokcompile.optimize, tokcompile.llm.Prefill(lm), kwargs={"inputs_embeds": prompt}, spans=spans, outputs="reduced"
    )
    if method is None:
        return make(method="random", budget=1.0)
    stepwise = method in STEPWISE[TOKENS[0]]
    made = make(method=at_entrance("random" if stepwise else method), budget=tokcompile.Tokens(tokens), where=[layer])
    return make(method=method, budget=tokcompile.Flops(made.report.flops_ratio)) if stepwise else made


def at_entrance(method: str) -> Recipe:
    """The method at the entrance of a block; random and grid stand between attention and MLP otherwise.

    Pooling is told the grid, which a language model's prompt does not have.
    """
    recipe = dataclasses.replace(get_method(method), place="block")
    return dataclasses.replace(recipe, options={"shape": (GRID, GRID)}) if method == "m3" else recipe


def in_tower(method: str) -> Recipe:
    """The method at the blocks it names itself; random selection at the entrance of the last one, where most of them stand."""
    return dataclasses.replace(at_entrance(method), steps=last_block()) if method == "random" else get_method(method)


def _kept(path: Path, make: Any) -> Reduced:
    if path.exists():
        return Reduced(*torch.load(path))
    made: Reduced = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((made.features, made.cells.clone()), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    print(path, tuple(made.features.shape), flush=True)
    return made


def _resized(scene: Scene, side: int) -> Any:
    return np.asarray(Image.fromarray(scene.pixels).resize((side, side), Image.Resampling.BICUBIC))
