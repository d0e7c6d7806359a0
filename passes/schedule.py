"""Schedule: a method and a budget, or a plan passed back, become the `Reduction`s of a program: how many at each place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import floor
from typing import Any

from tokcompile.budget import Flops, KeepRate, Remove, Schedule, Share, Tokens, as_budget
from tokcompile.errors import BudgetError, MethodError, PlanError
from tokcompile.passes.find import Structure
from tokcompile.passes.layout import Layout
from tokcompile.passes.places import choose_slots, one_block, streams, visual_blocks
from tokcompile.passes.plan import OUTPUTS, RECOVER, Plan, Reduction
from tokcompile.passes.slots import Slot, after_others, make_slot, same_in_each
from tokcompile.recipe import Recipe
from tokcompile.steps import layer_of

ALL_GONE = "all tokens can be dropped only in a language model, where text is left beside them; leave at least one"

SolveFlops = Callable[[list[list[Slot]], Callable[[int, list[Slot]], list[int]], float], list[list[int]]]
MethodOf = Callable[[Reduction], tuple[Recipe, Mapping[str, Any]]]


def make_plan(
    structure: Structure,
    recipe: Recipe,
    budget: Any,
    *,
    where: Sequence[int | str] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    options: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    solve_flops: SolveFlops | None = None,
    labels: Mapping[Any, Any] | None = None,
) -> tuple[Reduction, ...]:
    """Decides at which blocks to reduce, and to how many tokens; `labels` say what earlier reductions left.

    Raises: BudgetError, MethodError, UnsupportedGraph.
    """
    budget, layout = as_budget(budget), layout or Layout()
    slots = [after_others(s, labels or {}, spans) for s in choose_slots(structure, recipe, budget, where, spans, layout)]
    if isinstance(budget, (Share, Flops, KeepRate)) and next(iter(vars(budget).values())) == 1:
        return ()
    if isinstance(budget, Schedule):  # by numbers from the front
        budget = Schedule({s.block.index: budget.counts[b] for s, b in zip(slots, sorted(budget.counts))})
    of_stream = [[s for s in slots if s.block in one] for one in streams([s.block for s in slots])]
    if isinstance(budget, Flops):
        assert solve_flops is not None
        counts = solve_flops(of_stream, lambda k, one: spread(k, recipe, one, options or {}), budget.ratio)
    else:
        counts = [counts_of(budget, recipe, one, options or {}) for one in of_stream]
    chosen = [r for one, each in zip(of_stream, counts) for r in reductions(each, one, recipe, options or {})]
    return tuple(chosen if len(of_stream) == 1 else sorted(chosen, key=lambda r: r.block))


def counts_of(budget: Any, recipe: Recipe, slots: list[Slot], options: Mapping[str, Any]) -> list[int]:
    """How many tokens of one stream are left after each of its reductions. Raises: BudgetError."""
    n = slots[0].n
    if not n:
        raise BudgetError(f"no visual tokens are left to reduce at block {slots[0].block.index}: all were dropped before")
    if isinstance(budget, Schedule):
        counts = [budget.counts[s.block.index] for s in slots]
    elif isinstance(budget, Remove):
        counts = even(removals(budget, recipe, slots, options), slots[0])
    elif isinstance(budget, KeepRate):
        counts = even(rates(budget.rate, recipe, slots), slots[0])
    else:
        final = budget.k if isinstance(budget, Tokens) else max(1, floor(budget.share * n + 0.5))
        if final > n:
            raise BudgetError(f"Tokens({final}) is more than the {n} tokens there are")
        counts = list(recipe.steps.counts(n, final, len(slots)))
        counts = even(counts, slots[0]) if isinstance(budget, Share) or final % slots[0].samples == 0 else counts
    if uneven := next((k for k in reversed(counts) if k % slots[0].samples), None):
        raise BudgetError(
            f"{slots[0].samples} samples become a batch, and {uneven} tokens in all are not as many for each\n"
            f"  what to do: a multiple of {slots[0].samples}, or a share"
        )
    return counts


def spread(final: int, recipe: Recipe, slots: list[Slot], options: Mapping[str, Any]) -> list[int]:
    """Counts that end at `final`, or at what the method can reach."""
    return even(clipped(recipe.steps.counts(slots[0].n, final, len(slots)), recipe, slots[0], options), slots[0])


def even(counts: Sequence[int], slot: Slot) -> list[int]:
    """Counts that samples which become a batch can share."""
    if slot.samples == 1:
        return list(counts)
    return [max(len(slot.left), floor(k / slot.samples + 0.5) * slot.samples) for k in counts]


def removals(budget: Remove, recipe: Recipe, slots: list[Slot], options: Mapping[str, Any]) -> list[int]:
    """ToMe's r per block, clipped to what one step of the method can remove."""
    n, counts = slots[0].n, []
    for r in budget.per_block(len(slots)):
        n = max(n - r, least(recipe, n, slots[0], options), 0 if slots[0].drops else 1)
        counts.append(n)
    return counts


def clipped(counts: Sequence[int], recipe: Recipe, slot: Slot, options: Mapping[str, Any] | None) -> list[int]:
    """A schedule in which no step removes more than the method can (ToMe: half of the tokens)."""
    out, n = [], slot.n
    for k in counts:
        n = min(n, max(k, len(slot.spans), least(recipe, n, slot, options or {}))) if k or not slot.drops else 0
        out.append(n)
    return out


def rates(rate: float, recipe: Recipe, slots: list[Slot]) -> list[int]:
    n, counts = slots[0].n, []
    for i, slot in enumerate(slots):
        n = max(1, recipe.steps.rate(n, slot.n, rate, i))
        counts.append(n)
    return counts


def least(recipe: Recipe, n: int, slot: Slot, options: Mapping[str, Any]) -> int:
    """The fewest tokens that one step of the method can leave of n."""
    return recipe.least(n, {**recipe.options, **options, "prefix": slot.spans[0][0]})


def apportion(k: int, sizes: Sequence[int], samples: int = 1) -> list[int]:
    """Shares a static total over segments in proportion to their sizes: largest remainder, at least one each of those that
    are left, unless all go; the same in each of several samples, where it can be."""
    if not k:
        return [0] * len(sizes)
    if not all(sizes):
        shares = iter(apportion(k, [s for s in sizes if s]))
        return [next(shares) if s else 0 for s in sizes]
    if samples > 1 and k % samples == 0 and same_in_each(sizes, samples):
        return apportion(k // samples, sizes[: len(sizes) // samples]) * samples
    total = sum(sizes)
    exact = [k * s / total for s in sizes]
    counts = [max(1, min(int(e), s)) for e, s in zip(exact, sizes)]
    order = sorted(range(len(sizes)), key=lambda i: (-(exact[i] - int(exact[i])), i))
    for i in order * 2:
        if sum(counts) < k and counts[i] < sizes[i]:
            counts[i] += 1
    while sum(counts) > k and max(counts) > 1:  # the ones that every segment must keep come from the largest
        counts[counts.index(max(counts))] -= 1
    return counts


def reductions(
    counts: Sequence[int], slots: Sequence[Slot], recipe: Recipe, options: Mapping[str, Any]
) -> tuple[Reduction, ...]:
    """The counts as reductions, one per segment; steps that remove nothing are left out. Raises: BudgetError."""
    out = []
    current = list(slots[0].left)
    for slot, k in zip(slots, counts):
        if not k and not slot.drops:
            raise BudgetError(f"block {slot.block.index}: {ALL_GONE}")
        if not (len([n for n in current if n]) if k else 0) <= k <= sum(current):
            raise BudgetError(f"block {slot.block.index}: {sum(current)} tokens come in, {k} cannot be left")
        for i, (n, want, (start, stop)) in enumerate(zip(list(current), apportion(k, current, slot.samples), slot.spans)):
            lowest = least(recipe, n, slot, options)
            if 0 < want < lowest:  # to drop all, no method is asked
                raise BudgetError(
                    f"block {slot.block.index}: {recipe.name!r} cannot go from {n} to {want} tokens in one step, only to "
                    f"{lowest}; spread the budget over more blocks (where=...) or raise it"
                )
            if want < n:
                head, tail = slot.token(start), slot.stage.length - slot.token(stop)
                out.append(Reduction(slot.block.index, n, want, slot.place, head, tail, slot.unit, slot.block.path))
            current[i] = want
    return tuple(out)


def dropping(
    structure: Structure,
    recipe: Recipe,
    layer: float,
    spans: Sequence[tuple[int, int]] | None,
    labels: Mapping[Any, Any],
    chosen: Sequence[Reduction],
) -> tuple[Reduction, ...]:
    """What the option `drop_layer` adds to the chosen reductions, which left what `labels` say: at the entrance of that layer
    of the language model all visual tokens go.

    Raises: MethodError, PlanError, UnsupportedGraph.
    """
    blocks = visual_blocks(structure, spans, language=True)
    block = blocks[layer_of("drop_layer", len(blocks), layer)]
    slot = after_others(make_slot(block, "block", spans, Layout()), labels, spans)
    if not slot.drops:
        raise MethodError(f"drop_layer={layer}: {ALL_GONE}")
    if chosen and (block.index, False) <= (chosen[-1].block, chosen[-1].place == "attention"):
        raise PlanError(
            f"drop_layer={layer} is block {block.index}, and {recipe.name!r} reduces at block {chosen[-1].block}\n"
            "  what to do: a later layer; or let the method stand before it: where=[...]"
        )
    return reductions([0], [slot], recipe, {})


def fit_plan(plan: Plan, structure: Structure, method_of: MethodOf) -> tuple[Reduction, ...]:
    """A plan passed back by the user, checked against the model and what its methods can do. Raises: PlanError."""
    current: dict[tuple[int, int, int], int] = {}
    out: list[Reduction] = []
    for name, allowed in (("outputs", OUTPUTS), ("recover", RECOVER)):
        if getattr(plan, name) not in allowed:
            raise PlanError(f"the plan's {name}={getattr(plan, name)!r} is none of {', '.join(map(repr, allowed))}")
    planned = [replace(r, block=one_block(structure.blocks, r.block).index) for r in plan.reductions]  # -1 is the last
    order = [(r.block, r.place == "attention") for r in planned]
    if order != sorted(order):
        raise PlanError("the plan's reductions are not in the order of their blocks")
    if len({(r.block, r.place, r.prefix) for r in planned}) < len(planned):
        raise PlanError("the plan reduces the same tokens twice at one place: write one reduction, to the smaller k")
    blocks = [structure.blocks[r.block] for r in planned]
    stream = {b.index: i for i, one in enumerate(streams(blocks)) for b in one}
    for r, block in zip(planned, blocks):
        if r.unit < 1 or r.prefix < 0 or r.suffix < 0 or (block.stage.length - r.prefix - r.suffix) % r.unit:
            raise PlanError(
                f"the plan at block {r.block}: prefix {r.prefix}, suffix {r.suffix} and groups of {r.unit} do not fit its "
                f"{block.stage.length} tokens"
            )
        key = (stream[block.index], block.stage.length, r.prefix)
        shorter = (block.stage.length - r.prefix - r.suffix) // r.unit
        if out and structure.blocks[out[-1].block].stage is not block.stage and r.n < shorter:
            shorter = r.n  # tokens are gone before this stage begins; the rewrite checks that it is so
        n = current.get(key, shorter)
        if r.k == 0 and not leaves_text(r, planned, structure):
            raise PlanError(f"the plan at block {r.block}: {ALL_GONE}")
        if not 0 <= r.k <= n:
            raise PlanError(f"the plan leaves {r.k} tokens at block {r.block}, where {n} come in")
        if r.n != n and key not in current:
            raise PlanError(f"the plan says {r.n} tokens come into block {r.block}; the model has {n}")
        if r.place not in ("attention", "block"):
            raise PlanError(f"the plan's place {r.place!r} is neither 'attention' nor 'block'")
        if block.why_not:
            raise PlanError(f"tokens cannot be reduced in block {r.block} ({block.path}): {block.why_not}")
        if r.options and not r.method:
            raise PlanError(f"the plan's reduction at block {r.block} has options and no method: they are the plan's options")
        recipe, options = method_of(r)
        lowest = recipe.least(n, {**recipe.options, **options, "prefix": r.prefix})
        if 0 < r.k < min(lowest, n):
            raise PlanError(
                f"the plan leaves {r.k} of {n} tokens at block {r.block}, and {recipe.name!r} leaves at least {lowest} of them "
                "in one step"
            )
        current[key] = r.k
        if r.k < n:
            out.append(replace(r, n=n, path=block.path))
    return tuple(out)


def leaves_text(r: Reduction, planned: Sequence[Reduction], structure: Structure) -> bool:
    """Whether tokens stand around all those that a plan reduces in a stage, as text does, where `r` drops its own."""
    block, stage = structure.blocks[r.block], structure.blocks[r.block].stage
    same = [one for one in planned if structure.blocks[one.block].stage is stage]
    inside = {at for one in same for at in range(one.prefix, stage.length - one.suffix)}
    return (block.language or not stage.visual) and r.unit == 1 and len(inside) < stage.length
