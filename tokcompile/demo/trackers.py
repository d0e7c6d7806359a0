"""Where the original patches live after each reduction: read from the reductions while the optimized model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokcompile.api import OptimizedModel
from tokcompile.passes.reduction import ReductionModule

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stage:
    """What is left after one reduction.

    owner: (N,) for each original patch the token it is in, 0 <= owner < count, or -1 where it was dropped.
    """

    block: int
    method: str
    count: int
    merging: bool
    owner: Array

    @property
    def sizes(self) -> Array:
        """(count,): how many original patches are in each token."""
        return np.bincount(self.owner[self.owner >= 0], minlength=self.count)


def untouched(patches: int) -> Stage:
    """Before the first reduction: every patch is its own token."""
    return Stage(-1, "", patches, False, np.arange(patches))


def follow(model: OptimizedModel, *inputs: torch.Tensor) -> list[Stage]:
    """Runs the model and returns one stage for each of its reductions, for the first sample of the batch.

    The tokens have to be one run (one image in one sequence), which is what every vision encoder has.
    """
    reductions = model.plan.reductions
    with recorded(model) as records, torch.no_grad():
        model(*inputs)
    assert len(records) == len(reductions), "every reduction of the plan runs once"
    stages: list[Stage] = []
    for reduction, (method, index, assign) in zip(reductions, records, strict=True):
        owner = stages[-1].owner if stages else np.arange(reduction.n)
        to = assign if assign is not None else places(index, reduction.n)
        stages.append(Stage(reduction.block, method, reduction.k, assign is not None, moved(owner, to)))
    return stages


def places(index: Array, n: int) -> Array:
    """(n,): where each of n tokens stands among the kept ones `index`: (k,), or -1 where it was dropped."""
    to = np.full(n, -1)
    to[index] = np.arange(len(index))
    return to


def moved(owner: Array, to: Array) -> Array:
    """The owners after one more reduction, which puts token i into token to[i]."""
    return np.where(owner >= 0, to[owner], -1)


def after(stages: Sequence[Stage], block: int, patches: int) -> Stage:
    """The stage that holds at the end of this block."""
    done = [stage for stage in stages if stage.block <= block]
    return done[-1] if done else untouched(patches)


def per_block(stages: Sequence[Stage], depth: int, patches: int) -> list[int]:
    """How many patch tokens leave each block."""
    return [after(stages, block, patches).count for block in range(depth)]


@contextmanager
def recorded(model: OptimizedModel) -> Iterator[list[tuple[str, Array, Array | None]]]:
    """Collects (method, index, assign or None where nothing is merged) of each reduction that runs in the block."""
    records: list[tuple[str, Array, Array | None]] = []

    def keep(module: Any, args: Any, results: Any) -> None:
        _, index, size, assign = results
        merging = size is not None  # only what merges counts how many patches a token holds
        records.append((module.recipe.name, index[0].numpy(), assign[0].numpy() if merging else None))

    modules = [m for m in model.graph_module.modules() if isinstance(m, ReductionModule)]
    before = [m.needs_assign for m in modules]
    hooks = [m.register_forward_hook(keep) for m in modules]
    for module in modules:
        module.needs_assign = True
    try:
        yield records
    finally:
        for hook, module, needed in zip(hooks, modules, before, strict=True):
            hook.remove()
            module.needs_assign = needed
