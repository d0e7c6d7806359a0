"""The pipeline: the passes in order, in one place."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from tokcompile.errors import BudgetError, UnsupportedGraph
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.cost import Term, terms, total
from tokcompile.passes.find import Structure, find
from tokcompile.passes.flatten import flatten_grids
from tokcompile.passes.graph import propagate_shapes, shape
from tokcompile.passes.plan import Plan, Reduction, Slot, fit_plan, make_plan
from tokcompile.passes.rewrite import Rewriter, Rewritten, Splice
from tokcompile.passes.trace import Traced, trace
from tokcompile.recipe import Recipe, Site, get_method

LARGEST_UNIT = 16  # a view that splits tokens into larger groups is a grid or a window, not a merger


@dataclass
class Analysis:
    """A traced model in canonical form, and what was found in it."""

    traced: Traced
    graph: GraphModule
    structure: Structure
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """The batch size, as the residual stream has it."""
        for block in self.structure.blocks:
            if block.batch_axis is not None:
                return shape(block.mid)[block.batch_axis]
        return 1


@dataclass
class Settings:
    """What the user asked for, once."""

    recipe: Recipe
    options: Mapping[str, Any]
    outputs: str = "keep"
    recover: str = "end"
    size_weighted_mean: bool = True
    spans: Sequence[tuple[int, int]] | None = None


@dataclass
class Compiled:
    """The result of the pipeline: the plan that was carried out and the graph it gave."""

    plan: Plan
    rewritten: Rewritten | None
    cost: list[Term]

    @property
    def flops(self) -> int:
        return total(self.cost)


def analyse(model: Any, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> Analysis:
    """Passes 1 to 3: trace, canonicalise, find."""
    seconds: dict[str, float] = {}
    traced = timed(seconds, "trace", lambda: trace(model, args, kwargs))
    graph = timed(seconds, "canonicalise", lambda: canonicalise(traced.gm, traced.inputs))
    return understand(traced, graph, seconds)


def understand(traced: Traced, graph: GraphModule, seconds: dict[str, float]) -> Analysis:
    """Finds the structure; token grids on two axes are flattened on the way."""
    structure = timed(seconds, "find", lambda: find(graph.graph))
    if flatten_grids(graph, structure):
        propagate_shapes(graph, traced.inputs)
        graph.recompile()
        structure = timed(seconds, "find", lambda: find(graph.graph))
    return Analysis(traced, graph, structure, seconds)


def timed(seconds: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = run()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return result


def compile_plan(analysis: Analysis, settings: Settings, budget: Any, where: Sequence[int] | None, plan: Plan | None) -> Compiled:
    """Passes 4 to 7: plan, rewrite with recovery, cost; groups of tokens that a merger needs are found on the way."""
    unit = 1
    while True:
        try:
            if plan is not None:
                reductions = fit_plan(plan, analysis.structure)
            else:
                reductions = timed(analysis.seconds, "plan", lambda: make_plan(
                    analysis.structure, settings.recipe, budget, where=where, spans=settings.spans,
                    options=settings.options, unit=unit, solve_flops=lambda *a: solve_flops(analysis, settings, unit, *a),
                ))
            made = Plan(
                settings.recipe.name, reductions, dict(settings.options), budget_data(budget, plan), settings.outputs,
                settings.recover,
            )
            if not reductions:
                return Compiled(made, None, terms(analysis.graph.graph, {}))
            rewritten = timed(analysis.seconds, "rewrite", lambda: rewrite(analysis, settings, reductions))
            cost = terms(analysis.graph.graph, rewritten.labels, rewritten.recovered)
            return Compiled(made, rewritten, cost)
        except NeedsUnit as needed:
            if unit != 1:
                raise needed.error from None
            unit = needed.unit


def budget_data(budget: Any, plan: Plan | None) -> Mapping[str, Any]:
    from tokcompile.budget import as_budget, to_data

    return plan.budget if plan is not None else to_data(as_budget(budget))


class NeedsUnit(Exception):
    """The model glues groups of `unit` neighbouring tokens together later on: whole groups must be kept or dropped."""

    def __init__(self, unit: int, error: Exception):
        super().__init__(unit)
        self.unit, self.error = unit, error


def rewrite(analysis: Analysis, settings: Settings, reductions: Sequence[Reduction]) -> Rewritten:
    """One rewrite of the analysed graph. Raises: UnsupportedGraph, NeedsUnit."""
    rewriter = Rewriter(
        analysis.graph, analysis.structure, splices(analysis, settings, reductions), batch=analysis.batch,
        outputs=settings.outputs, recover=settings.recover, size_weighted_mean=settings.size_weighted_mean,
    )
    try:
        result = rewriter.run()
    except UnsupportedGraph as error:
        unit = unit_of(rewriter, reductions)
        if unit:
            raise NeedsUnit(unit, error) from error
        raise
    unit = unit_of(rewriter, reductions)
    if unit and any(r.inside for r in result.recoveries):
        raise NeedsUnit(unit, UnsupportedGraph("a group of tokens is split"))
    return result


def unit_of(rewriter: Rewriter, reductions: Sequence[Reduction]) -> int | None:
    """The group size, where a view splits a whole sequence without prefix into small groups."""
    for split in rewriter.splits:
        grids = [s.grid or () for s in rewriter.structure.stages]
        if split.unit and 1 < split.unit <= LARGEST_UNIT and len(split.seq.parts) == 1 and reductions[0].unit == 1:
            if not any(split.unit in grid for grid in grids):
                return split.unit
    return None


def splices(analysis: Analysis, settings: Settings, reductions: Sequence[Reduction]) -> list[Splice]:
    """The reductions of a plan with the graph nodes they stand for."""
    blocks = analysis.structure.blocks
    out = []
    for step, r in enumerate(reductions):
        block = blocks[r.block]
        grid = block.stage.grid if r.n == block.stage.n and r.unit == 1 else None
        site = Site(r.n, r.k, r.prefix, r.suffix, step, len(reductions), r.block, len(blocks), grid, settings.options)
        at = block.out if r.place == "attention" else block.entry
        before = block if r.place == "attention" else next((b for b in reversed(blocks[: r.block])), None)
        out.append(Splice(settings.recipe, block, at, r.k, site, r.unit, before))
    return out


def solve_flops(
    analysis: Analysis, settings: Settings, unit: int, slots: list[Slot], counts: Callable[[int], list[int]], ratio: float,
    candidates: range,
) -> int:
    """The largest final token count whose FLOPs do not exceed `ratio` of the original, exactly, over this schedule."""
    original = total(terms(analysis.graph.graph, {}))
    probe = [max(1, s.n - 1 - i) for i, s in enumerate(slots)]
    n = slots[0].n
    probe = [max(1, n - 1 - i) for i in range(len(slots))]
    reductions, current = [], n
    for slot, k in zip(slots, probe):
        if k < current:
            reductions.append(Reduction(slot.block.index, current, k, slot.place, slot.prefix, slot.suffix, unit))
            current = k
    identity = Recipe("probe", first_tokens, place=settings.recipe.place)
    probed = rewrite(analysis, Settings(identity, {}, settings.outputs, settings.recover), reductions)
    cost = terms(analysis.graph.graph, probed.labels, probed.recovered)

    def share(final: int) -> float:
        return total(cost, dict(zip(probed.spaces, counts(final)))) / original

    low, high = candidates.start, candidates.stop - 1
    if share(low) > ratio:
        from tokcompile.passes.plan import least

        del least
        raise BudgetError(
            f"Flops({ratio}) cannot be met: even with one token left after the last reduction {share(low):.3f} of the FLOPs "
            f"remain (reductions at blocks {[s.block.index for s in slots]}); reduce earlier (where=...) or raise the budget"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle) <= ratio else (low, middle - 1)
    return low


def first_tokens(tokens: Any, site: Site) -> Any:
    """A stand-in method for costing: it keeps the first k tokens."""
    from tokcompile.recipe import Keep

    return Keep(torch.arange(site.k, device=tokens.x.device).expand(tokens.x.shape[0], -1))


def settings_for(method: str | Recipe, options: Mapping[str, Any], **rest: Any) -> Settings:
    recipe = get_method(method)
    return Settings(recipe, recipe.with_options(options), **rest)
