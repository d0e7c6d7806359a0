"""The pipeline: the passes in order, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch.fx import GraphModule

from tokcompile.budget import as_budget, to_data
from tokcompile.errors import BudgetError, InputError, PlanError, TokcompileError, UnsupportedGraph
from tokcompile.flops import solve_flops
from tokcompile.passes.canonicalise import FIXED, canonicalise
from tokcompile.passes.convolutions import write_convolutions
from tokcompile.passes.cost import Term, terms, total
from tokcompile.passes.crop import Hidden, among_shown, can_choose, left_of
from tokcompile.passes.faithful import check_canonical
from tokcompile.passes.find import Structure, find
from tokcompile.passes.fixed import Fixed
from tokcompile.passes.flatten import flatten_grids, flatten_projector, flatten_tiles
from tokcompile.passes.fold import FOLDED, Folded
from tokcompile.passes.graph import propagate_shapes
from tokcompile.passes.layout import Layout, NeedsLayout, demanded, with_layout
from tokcompile.passes.memory import reachable_from
from tokcompile.passes.mosaic import write_mosaics
from tokcompile.passes.places import before, choose_slots, stack_of, streams
from tokcompile.passes.plan import Plan, Reduction
from tokcompile.passes.regroup import Grouping, find_groupings, regroup
from tokcompile.passes.rewrite import Rewriter, Rewritten
from tokcompile.passes.schedule import dropping, fit_plan, least, make_plan
from tokcompile.passes.slots import Slot, named_spans
from tokcompile.passes.splice import Splice
from tokcompile.passes.tokens import Space
from tokcompile.passes.trace import Traced, trace
from tokcompile.recipe import Recipe, Site, get_method

PLAIN = Layout()
MILD = 0.75  # a budget that every method can meet in any number of steps


@dataclass
class Analysis:
    """A traced model in canonical form, and what was found in it."""

    traced: Traced
    graph: GraphModule
    structure: Structure
    seconds: dict[str, float] = field(default_factory=dict)
    regrouped: Analysis | None = None  # the same with tokens in the order of the groups that are made of them later

    @cached_property
    def groupings(self) -> list[Grouping]:
        """Where tokens are rearranged into groups; none where they are in that order."""
        return find_groupings(self.graph, self.structure)

    def laid_out(self, layout: Layout) -> Analysis:
        """The analysis that a layout is about."""
        if not layout.regrouped or not self.groupings:
            return self
        if self.regrouped is None:
            graph = regroup(self.graph, self.structure, self.groupings, self.traced.inputs)
            check_canonical(graph, self.traced.gm, self.traced.inputs)
            self.regrouped = Analysis(self.traced, graph, find(graph), self.seconds)
            self.regrouped.groupings = []
        return self.regrouped

    @property
    def fixed(self) -> list[Fixed]:
        """The places of image features in a prompt, which were fixed from the example inputs."""
        return list(self.graph.meta.get(FIXED, ()))

    @property
    def folded(self) -> Folded:
        """The weights that constants were computed from."""
        return self.graph.meta.get(FOLDED) or Folded()

    @property
    def guards(self) -> list[str]:
        """All that is right only for inputs like the example."""
        return [*self.traced.guards, *(f.guard for f in self.fixed)]


@dataclass
class Settings:
    """What the user asked for, once."""

    recipe: Recipe
    options: Mapping[str, Any]
    outputs: str = "keep"
    recover: str = "end"
    size_weighted_mean: bool = True
    spans: Sequence[tuple[int, int]] | None = None
    recipes: Mapping[str, Recipe] = field(default_factory=dict)  # of earlier methods that are not registered

    def method_of(self, r: Reduction) -> tuple[Recipe, Mapping[str, Any]]:
        """The recipe and the options of one reduction."""
        if not r.method:
            return self.recipe, self.options
        recipe = self.recipe if r.method == self.recipe.name else self.recipes.get(r.method) or get_method(r.method)
        return recipe, recipe.with_options(r.options)


@dataclass
class Compiled:
    """The result of the pipeline: the plan that was carried out and the graph it gave."""

    plan: Plan
    rewritten: Rewritten | None
    cost: list[Term]
    analysis: Analysis

    @property
    def flops(self) -> int:
        return total(self.cost)


def analyse(model: Any, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> Analysis:
    """Passes 1 to 3: trace, canonicalise, find; then a run on the example shows that nothing was changed."""
    seconds: dict[str, float] = {}
    traced = timed(seconds, "trace", lambda: trace(model, args, kwargs))
    graph = timed(seconds, "canonicalise", lambda: canonicalise(traced.gm, traced.inputs))
    analysis = understand(traced, graph, seconds)
    timed(seconds, "compare", lambda: check_canonical(graph, traced.gm, traced.inputs, traced.outputs))
    traced.outputs = None
    return analysis


def understand(traced: Traced, graph: GraphModule, seconds: dict[str, float]) -> Analysis:
    """Finds the structure; token grids on two axes are flattened on the way."""
    structure = timed(seconds, "find", lambda: find(graph))
    changed = write_convolutions(graph, structure)
    if changed:  # newline tokens that stood beside their maps stand beside tokens now
        propagate_shapes(graph, traced.inputs)
        write_mosaics(graph)
    changed |= flatten_grids(graph, structure)
    while changed or flatten_projector(graph, structure) or flatten_tiles(graph, structure):
        propagate_shapes(graph, traced.inputs)
        graph.recompile()
        structure, changed = timed(seconds, "find", lambda: find(graph)), False
    return Analysis(traced, graph, structure, seconds)


def timed(seconds: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = run()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return result


@dataclass(frozen=True)
class Request:
    """What is to be planned: a budget over chosen blocks, or a whole plan. earlier: reductions that are there already and
    stay."""

    settings: Settings
    budget: Any
    where: Sequence[int | str] | None
    plan: Plan | None = None
    earlier: Compiled | None = None

    @property
    def before(self) -> tuple[Reduction, ...]:
        return named(self.earlier.plan) if self.earlier else ()

    def planned(self, analysis: Analysis, layout: Layout, budget: Any) -> tuple[Reduction, ...]:
        """The reductions of a budget, behind those that are there. Raises: BudgetError, PlanError, UnsupportedGraph."""
        settings = self.settings

        def probe(stand_in: Recipe, chosen: Sequence[Reduction]) -> tuple[Rewritten, list[Space]]:
            known = replace(settings, recipes={**settings.recipes, stand_in.name: stand_in})
            probing = (*self.before, *(replace(r, method=stand_in.name) for r in chosen))
            probed = rewrite(analysis, known, probing, layout)
            if gone := dropped_at(analysis, settings, probing, probed):
                probed = rewrite(analysis, known, (*probing, *gone), layout)
            return probed, probed.spaces[len(self.before) :]

        def to_nothing(slot: Slot) -> bool:
            """Whether the method's own schedule ends without any; what has to be given back would cost more than is counted."""
            short = settings.outputs == "reduced" and slot.drops
            return short and not least(settings.recipe, slot.n, slot, settings.options)

        chosen = timed(
            analysis.seconds,
            "plan",
            lambda: make_plan(
                analysis.structure,
                settings.recipe,
                budget,
                where=self.where,
                spans=settings.spans,
                options=settings.options,
                layout=layout,
                solve_flops=lambda *a: solve_flops(analysis.graph.graph, settings.recipe, probe, to_nothing, *a),
                labels=self.earlier.rewritten.labels if self.earlier and self.earlier.rewritten else None,
            ),
        )
        return joined(self.before, settings, chosen)

    def carried_out(self, chosen: tuple[Reduction, ...]) -> Plan:
        """The plan to hand out."""
        settings = self.settings
        budget = self.plan.budget if self.plan is not None else to_data(as_budget(self.budget))
        made = Plan(settings.recipe.name, chosen, dict(settings.options), budget, settings.outputs, settings.recover)
        if self.before and self.earlier:
            made = made.replace(method=self.earlier.plan.method, options=self.earlier.plan.options)
        return made


def compile_plan(
    analysis: Analysis,
    settings: Settings,
    budget: Any,
    where: Sequence[int | str] | None,
    plan: Plan | None,
    earlier: Compiled | None = None,
) -> Compiled:
    """Passes 4 to 7: plan, rewrite with recovery, cost. earlier: see `Request`."""
    request = Request(settings, budget, where, plan, earlier)
    return with_layout(lambda layout: compile_in(layout, analysis, request), give_back=settings.recover == "anywhere")


def compile_in(layout: Layout, given: Analysis, request: Request) -> Compiled:
    """One try. Raises: NeedsLayout for another one, and what its passes raise."""
    analysis, settings = given.laid_out(layout), request.settings
    if request.plan is not None:
        chosen = fit_plan(request.plan, analysis.structure, settings.method_of)
    else:
        try:
            chosen = request.planned(analysis, layout, request.budget)
        except BudgetError as error:
            raise in_groups(error, layout, given, request) from None
    rewritten = timed(analysis.seconds, "rewrite", lambda: rewrite(analysis, settings, chosen, layout)) if chosen else None
    if request.plan is None and (gone := dropped_at(analysis, settings, chosen, rewritten)):
        chosen = (*chosen, *(named_after(settings, gone) if request.before else gone))
        rewritten = timed(analysis.seconds, "rewrite", lambda: rewrite(analysis, settings, chosen, layout))
    made = request.carried_out(chosen)
    if rewritten is None:
        return Compiled(made, None, terms(analysis.graph.graph, {}), analysis)
    cost = terms(analysis.graph.graph, rewritten.labels, rewritten.recovered, rewritten.mixed)
    return Compiled(made, rewritten, cost, analysis)


def dropped_at(
    analysis: Analysis, settings: Settings, chosen: Sequence[Reduction], rewritten: Rewritten | None
) -> tuple[Reduction, ...]:
    """What the option `drop_layer` adds to the reductions of a rewrite."""
    layer = settings.options.get("drop_layer")
    if layer is None:
        return ()
    labels = rewritten.labels if rewritten is not None else {}
    return dropping(analysis.structure, settings.recipe, layer, settings.spans, labels, chosen)


def in_groups(error: BudgetError, layout: Layout, given: Analysis, request: Request) -> Exception:
    """A budget that single tokens cannot meet may be one for the groups that are made of them."""
    settings, analysis = request.settings, given.laid_out(layout)
    slots = choose_slots(given.structure, settings.recipe, as_budget(request.budget), request.where, settings.spans, Layout())
    for grouping in given.groupings:
        inside = any(e.node in given.structure.leading for e in grouping.exits)
        if layout == Layout() and grouping.stage is slots[0].stage and (inside or settings.outputs == "reduced"):
            return NeedsLayout(Layout(grouping.unit, (), True), error)
    try:  # a budget that single tokens can meet shows whether there are groups
        rewrite(analysis, settings, request.planned(analysis, layout, MILD), layout)
    except NeedsLayout as needed:
        return NeedsLayout(needed.layout, error)
    except TokcompileError:
        pass
    return error


def named(plan: Plan) -> tuple[Reduction, ...]:
    """The reductions of a plan, each with its method and options."""
    return tuple(r if r.method else replace(r, method=plan.method, options=dict(plan.options)) for r in plan.reductions)


def joined(before: tuple[Reduction, ...], settings: Settings, chosen: tuple[Reduction, ...]) -> tuple[Reduction, ...]:
    """Earlier reductions and then the new ones, each under its method's name. Raises: PlanError."""
    if not before:
        return chosen
    last, recipe = before[-1], settings.recipe
    if chosen and (chosen[0].block, chosen[0].place == "attention") <= (last.block, last.place == "attention"):
        raise PlanError(
            f"this model is already reduced at block {last.block}; {recipe.name!r} would be placed at block "
            f"{chosen[0].block}, not after it\n  what to do: optimize for the earlier place first, or name later blocks: "
            "where=[...]"
        )
    return (*before, *named_after(settings, chosen))


def named_after(settings: Settings, chosen: Sequence[Reduction]) -> tuple[Reduction, ...]:
    return tuple(replace(r, method=settings.recipe.name, options=dict(settings.options)) for r in chosen)


def rewrite(analysis: Analysis, settings: Settings, chosen: Sequence[Reduction], layout: Layout = PLAIN) -> Rewritten:
    """One rewrite of the analysed graph. Raises: UnsupportedGraph, NeedsLayout."""
    placed = splices(analysis, settings, chosen, layout.hidden)
    refuse_frozen(analysis, placed)
    rewriter = Rewriter(
        analysis.graph,
        analysis.structure,
        placed,
        inputs=analysis.traced.inputs,
        outputs=settings.outputs,
        recover=settings.recover,
        size_weighted_mean=settings.size_weighted_mean,
        mixers=analysis.traced.mixers,
    )

    def demand() -> Layout | None:
        return None if layout.final else demanded(rewriter, analysis.structure, analysis.groupings, chosen)

    try:
        result = rewriter.run()
    except UnsupportedGraph as error:
        if (wanted := demand()) is not None:
            raise NeedsLayout(wanted, error) from error
        raise
    if (settings.outputs == "reduced" or any(r.inside for r in result.recoveries)) and (wanted := demand()) is not None:
        torn = next(iter(rewriter.met), None)
        hint = "pass outputs='keep', or recover='anywhere', which gives tokens back there"
        raise NeedsLayout(wanted, UnsupportedGraph("tokens that belong together are torn apart", torn, hint))
    return result


def refuse_frozen(analysis: Analysis, placed: Sequence[Splice]) -> None:
    """Raises: UnsupportedGraph where the model reads values of reduced tokens back into Python, which tracing has fixed."""
    streams = {n for b in analysis.structure.blocks for n in (b.entry, b.mid)}
    for at in dict.fromkeys(s.at for s in placed) if analysis.traced.checks else ():
        names = {at.name, *(n.name for n in reachable_from({at}) & streams)}
        frozen = [text for check in analysis.traced.checks for text in check.behind(names)]
        if frozen:
            raise UnsupportedGraph(
                f"behind this reduction the model reads values back into Python, where they would be others: {frozen[0]}",
                at,
                "reduce behind it (where=[later blocks]); load a mixture of experts of transformers with "
                "experts_implementation='batched_mm' or 'grouped_mm', where it has that choice",
            )


def splices(analysis: Analysis, settings: Settings, chosen: Sequence[Reduction], hidden: Hidden = ()) -> list[Splice]:
    """The reductions of a plan with the graph nodes they stand for."""
    blocks = analysis.structure.blocks
    out = []
    still_hidden = hidden
    stream = {b.index: i for i, one in enumerate(streams([blocks[r.block] for r in chosen])) for b in one}
    for r in chosen:
        block, (recipe, options) = blocks[r.block], settings.method_of(r)
        same = (one.block for one in chosen if one.k and (one.method, stream[one.block]) == (r.method, stream[r.block]))
        order = [*dict.fromkeys(same)] or [r.block]
        stack = stack_of(block, blocks)
        grid = block.stage.grid if r.n == block.stage.n and r.unit == 1 else None
        site = Site(
            r.n,
            r.k,
            r.prefix // r.unit,
            r.suffix // r.unit,
            order.index(r.block) if r.block in order else len(order),
            len(order),
            stack.index(block),
            len(stack),
            grid,
            options=options,
        )
        at = block.out if r.place == "attention" else block.entry
        tapped = block if r.place == "attention" or recipe.ahead else before(block, blocks)
        language = block.language or (settings.spans is not None and not block.stage.visual)
        splice = Splice(recipe, block, at, r.k, site, r.prefix, r.unit, tapped, language)
        if hidden and not language and r.unit == 1 and splice.batch == len(hidden) and can_choose(recipe):
            splice.recipe, splice.hidden = among_shown(recipe, still_hidden), hidden
            still_hidden = left_of(still_hidden, r.n, r.k)
        out.append(splice)
    return out


def settings_for(method: str | Recipe, options: Mapping[str, Any], *, spans: Any = None, **rest: Any) -> Settings:
    """Raises: InputError, MethodError."""
    if not isinstance(weighted := rest.get("size_weighted_mean", True), bool):
        raise InputError(f"size_weighted_mean={weighted!r} is neither True nor False")
    recipe = get_method(method)
    return Settings(recipe, recipe.with_options(options), spans=None if spans is None else named_spans(spans), **rest)
