"""Plan: a method and a budget become a tuple of `Reduction`s: pure data that can be printed, saved, edited and passed back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import floor
from typing import Any

from tokcompile.budget import Flops, KeepRate, Remove, Schedule, Share, Tokens, as_budget
from tokcompile.errors import BudgetError, PlanError, UnsupportedGraph
from tokcompile.passes.find import Block, Stage, Structure
from tokcompile.passes.graph import shape
from tokcompile.passes.tokens import Seq
from tokcompile.recipe import Recipe

VERSION = 1
OUTPUTS = ("keep", "reduced")
RECOVER = ("end", "anywhere", "never")


@dataclass(frozen=True)
class Reduction:
    """One reduction. block: its number. place: "attention" (between attention and MLP) or "block" (at the entrance).

    n, k: tokens before and after, in units of `unit` neighbours. prefix, suffix: protected tokens around them, counted in
    the original sequence. path: the module path of the block, for the reader. method, options: where they are not the plan's.
    """

    block: int
    n: int
    k: int
    place: str = "attention"
    prefix: int = 0
    suffix: int = 0
    unit: int = 1
    path: str = ""
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All reductions of one program; `print` it, `json()` and `Plan.from_json()` it, `replace()` its reductions.

    Example:
        >>> import tokcompile
        >>> plan = tokcompile.Plan("tome", (tokcompile.Reduction(block=3, n=196, k=98, prefix=1),))
        >>> tokcompile.Plan.from_json(plan.json()) == plan
        True
    """

    method: str
    reductions: tuple[Reduction, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    outputs: str = "keep"
    recover: str = "end"
    version: int = VERSION

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises: PlanError for anything that is not a plan of a version we know."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or "reductions" not in data or "method" not in data:
                raise PlanError("this is not a tokcompile plan: it has no 'method' and 'reductions'")
            if data.get("version") != VERSION:
                raise PlanError(f"plan version {data.get('version')!r} is not the version {VERSION} that this release reads")
            data["reductions"] = tuple(Reduction(**r) for r in data["reductions"])
            return cls(**data)
        except (json.JSONDecodeError, TypeError) as error:
            raise PlanError(f"this is not a tokcompile plan: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan file. Raises: PlanError."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_json(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {os.fspath(path)!r}: {error}") from error

    def replace(self, **changes: Any) -> Plan:
        return replace(self, **changes)

    def __str__(self) -> str:
        names = list(dict.fromkeys([self.method, *(r.method for r in self.reductions if r.method)]))
        title = f"{' and '.join(names)}, {len(self.reductions)} reduction{'s' * (len(self.reductions) != 1)}"
        several = len(names) > 1
        rows = [
            f"  block {r.block:>3} {r.place:<9} {r.n:>5} -> {r.k:<5} {f'x{r.unit} ' * (r.unit > 1)}"
            f"{f'{r.method or self.method} ' * several}{r.path}"
            for r in self.reductions
        ]
        return "\n".join([title, *rows])


@dataclass(frozen=True)
class Layout:
    """What the graph was found to demand: groups of `unit` rows stay together, and `cuts` (in groups) part the tokens
    into segments that are never mixed (images or windows in one sequence), each with its own quota."""

    unit: int = 1
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slot:
    """A place where the method will reduce; `spans`: (start, stop) of the visual tokens in groups of the layout's unit,
    `left`: how many of each earlier reductions left."""

    block: Block
    place: str
    stage: Stage
    spans: tuple[tuple[int, int], ...]
    left: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.left)


SolveFlops = Callable[[list[Slot], Callable[[int], list[int]], float], list[int]]


def make_plan(
    structure: Structure,
    recipe: Recipe,
    budget: Any,
    *,
    where: Sequence[int | str] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    options: Mapping[str, Any] | None = None,
    layout: Layout = Layout(),
    solve_flops: SolveFlops | None = None,
    labels: Mapping[Any, Any] | None = None,
) -> tuple[Reduction, ...]:
    """Decides at which blocks to reduce, and to how many tokens; `labels` say what earlier reductions left.

    Raises: BudgetError, MethodError, UnsupportedGraph.
    """
    budget = as_budget(budget)
    slots = [after_others(s, labels or {}) for s in choose_slots(structure, recipe, budget, where, spans, layout)]
    if isinstance(budget, (Share, Flops, KeepRate)) and next(iter(vars(budget).values())) == 1:
        return ()
    n = slots[0].n
    if isinstance(budget, Schedule):
        counts = [budget.counts[b] for b in sorted(budget.counts)]
    elif isinstance(budget, Remove):
        counts = removals(budget, recipe, slots, options or {})
    elif isinstance(budget, KeepRate):
        counts = rates(budget.rate, recipe, slots)
    elif isinstance(budget, Flops):
        assert solve_flops is not None
        counts = solve_flops(
            slots, lambda k: clipped(recipe.steps.counts(n, k, len(slots)), recipe, slots[0], options), budget.ratio
        )
    else:
        final = budget.k if isinstance(budget, Tokens) else max(1, floor(budget.share * n + 0.5))
        if final > n:
            raise BudgetError(f"Tokens({final}) is more than the {n} tokens there are")
        counts = list(recipe.steps.counts(n, final, len(slots)))
    return reductions(counts, slots, recipe, options or {}, layout.unit)


def choose_slots(
    structure: Structure,
    recipe: Recipe,
    budget: Any,
    where: Sequence[int | str] | None,
    spans: Sequence[tuple[int, int]] | None,
    layout: Layout,
) -> list[Slot]:
    """The blocks to reduce at: the ones named, or the method's own among those that hold visual tokens."""
    blocks = structure.blocks
    if not blocks:
        raise no_blocks(structure)
    if isinstance(budget, Schedule):
        where = sorted(budget.counts)
    if where is not None:
        chosen = [one_block(blocks, b) for b in where]
        unsaid = [b for b in chosen if b.language and not b.stage.visual and not spans and not b.stage.spans]
        if unsaid:
            raise UnsupportedGraph(NOT_SAID, unsaid[0].mid, NAME_THEM)
    else:
        candidates = visual_blocks(structure, spans, recipe.steps.language is not None)
        chosen = [candidates[i] for i in recipe.steps.at(len(candidates), spans is not None or candidates[0].language)]
    place = recipe.place_in(spans is not None or chosen[0].language)
    refused = [b for b in chosen if b.why_not]
    if refused and (where is not None or len(refused) == len(chosen)):
        raise UnsupportedGraph(
            f"tokens cannot be reduced in block {refused[0].index} ({refused[0].path}): {refused[0].why_not}",
            refused[0].mid,
        )
    chosen = [b for b in chosen if not b.why_not]
    needs_attention = place == "block" and recipe.reads_attention() and not recipe.ahead and not recipe.opening
    if needs_attention and where is not None:
        early = [b for b in chosen if not before(b, blocks)]
        if early:
            raise UnsupportedGraph(
                f"{recipe.name!r} reads the attention of the block before, and none over the same tokens comes before block "
                f"{early[0].index}",
                early[0].mid,
                "place it later: where=[1] or higher",
            )
    elif needs_attention:
        chosen = [b for b in chosen if before(b, blocks)] or [b for b in visual_blocks(structure, spans) if before(b, blocks)][
            :1
        ]
        if not chosen:
            raise UnsupportedGraph(
                f"{recipe.name!r} reads the attention of the block before, and no two blocks hold the same tokens",
                blocks[0].mid,
                "choose a method that does not read attention",
            )
    lengths = {b.stage.length for b in chosen}
    if len(lengths) > 1:
        raise UnsupportedGraph(
            f"the blocks {[b.index for b in chosen]} hold {sorted(lengths, reverse=True)} tokens: "
            "one method works within one stage",
            hint=f"choose one stage: where={stage_blocks(structure)}",
        )
    return [make_slot(b, place, spans, layout) for b in chosen]


def no_blocks(structure: Structure) -> UnsupportedGraph:
    """The refusal of a model in which nothing was found, with what was seen instead."""
    seen = structure.unrecognised[:3] or ["no softmax between two matrix products, no fused attention"]
    more = len(structure.unrecognised) - len(seen)
    return UnsupportedGraph(
        f"no residual attention block was found in this model ({'; '.join(seen)}{f'; and {more} more' if more > 0 else ''})",
        hint="tokcompile reduces the tokens of transformer blocks; run `tokcompile inspect` on the model",
    )


def before(block: Block, blocks: Sequence[Block]) -> Block | None:
    """The last block over the same tokens that has been computed when `block` begins."""
    same = [b for b in blocks[: block.index] if kind(b) == kind(block) and b.stage is block.stage]
    return same[-1] if same else None


def stage_blocks(structure: Structure) -> str:
    by_length: dict[int, list[int]] = {}
    for b in structure.blocks:
        by_length.setdefault(b.stage.length, []).append(b.index)
    return " or ".join(str(v) for v in by_length.values())


def one_block(blocks: Sequence[Block], index: Any) -> Block:
    if isinstance(index, str):
        named = [b for b in blocks if b.path == index]
        if not named:
            raise PlanError(f"no block has the path {index!r}; there are {', '.join(b.path for b in blocks)}")
        return named[0]
    if not isinstance(index, int) or not -len(blocks) <= index < len(blocks):
        raise PlanError(f"block {index!r} is not among the {len(blocks)} blocks found (0 to {len(blocks) - 1})")
    return blocks[index]


NOT_SAID = "nothing in this graph says which positions are visual tokens (a language model on embeddings or ids)"
NAME_THEM = "name them: spans=[(start, stop)]"


def visual_blocks(structure: Structure, spans: Any, language: bool = False) -> list[Block]:
    """The blocks whose tokens are visual: those after a patch embedding; all of them where the user names spans.

    language: whether those of a language model come first, where the graph says which of its positions are visual.
    """
    blocks = structure.blocks
    prompted = [b for b in blocks if b.stage.spans]
    if spans is None and prompted and (language or not any(b.stage.visual for b in blocks)):
        blocks = prompted
    elif spans is None:
        visual = [b for b in blocks if b.stage.visual] or [b for b in blocks if not b.stage.text]
        causal = [b for b in visual if any(a.causal for a in b.attentions)]
        if not visual or causal:
            raise UnsupportedGraph(NOT_SAID, (causal or blocks)[0].mid, NAME_THEM)
        blocks = visual
    else:  # spans name positions of a text stream, where the graph has one
        blocks = [b for b in blocks if b.stage.text] or blocks
    kinds = [kind(b) for b in blocks if not b.why_not]
    # most blocks win; then the smaller batch, since inner blocks (pixels of a patch, windows) fold tokens into it
    most = max(dict.fromkeys(kinds), key=lambda one: (kinds.count(one), -one[1]), default=None)
    return [b for b in blocks if kind(b) == most] if most is not None else list(blocks)


def kind(block: Block) -> tuple[int, int, str]:
    """(tokens, batch, name without its numbers) of a block: blocks of one stack agree in all three."""
    batch = shape(block.mid)[block.batch_axis] if block.batch_axis is not None else 1
    return block.stage.length, batch, re.sub(r"\d+", "#", block.path)


def make_slot(block: Block, place: str, spans: Sequence[tuple[int, int]] | None, layout: Layout) -> Slot:
    stage, unit = block.stage, layout.unit
    spans = list(spans or stage.spans) or [(stage.prefix, stage.length - stage.suffix)]
    at = 0
    for start, stop in spans:
        if not at <= start < stop <= stage.length:
            raise BudgetError(
                f"span ({start}, {stop}) does not lie within the {stage.length} tokens of block {block.index}, "
                "or spans overlap or are out of order"
            )
        if start % unit or stop % unit or stage.length % unit:
            raise UnsupportedGraph(f"tokens {start} to {stop} of {stage.length} are not whole groups of {unit}", block.mid)
        at = stop
    pieces: list[tuple[int, int]] = []
    for start, stop in spans:
        edges = [start // unit, *(c for c in layout.cuts if start < c * unit < stop), stop // unit]
        pieces += list(zip(edges, edges[1:]))
    return Slot(block, place, stage, tuple(pieces), tuple(stop - start for start, stop in pieces))


def after_others(slot: Slot, labels: Mapping[Any, Any]) -> Slot:
    """The slot with what earlier reductions left of its spans, cut where those are cut. Raises: UnsupportedGraph."""
    label = labels.get(slot.block.entry)
    axis = label[slot.block.token_axis] if label is not None else ()
    seq = next((a for a in axis if isinstance(a, Seq)), None)
    if seq is None:
        return slot
    spans, left, at = [], [], 0
    for part in seq.parts:
        end = at + (part if isinstance(part, int) else part.root_n)
        inside = [(max(start, at), min(stop, end)) for start, stop in slot.spans if start < end and stop > at]
        if not isinstance(part, int) and inside not in ([], [(at, end)]):
            raise UnsupportedGraph(
                f"the tokens {slot.spans} are not those that were reduced before, {at} to {end}",
                slot.block.mid,
                "leave spans out, or name the same ones",
            )
        spans += inside
        left += [stop - start if isinstance(part, int) else part.k for start, stop in inside]
        at = end
    return replace(slot, spans=tuple(spans), left=tuple(left))


def apportion(k: int, sizes: Sequence[int]) -> list[int]:
    """Shares a static total over segments in proportion to their sizes: largest remainder, at least one each."""
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


def removals(budget: Remove, recipe: Recipe, slots: list[Slot], options: Mapping[str, Any]) -> list[int]:
    """ToMe's r per block, clipped to what one step of the method can remove."""
    n, counts = slots[0].n, []
    for r in budget.per_block(len(slots)):
        n = max(n - r, least(recipe, n, slots[0], options))
        counts.append(n)
    return counts


def clipped(counts: Sequence[int], recipe: Recipe, slot: Slot, options: Mapping[str, Any] | None) -> list[int]:
    """A schedule in which no step removes more than the method can (ToMe: half of the tokens)."""
    out, n = [], slot.n
    for k in counts:
        n = min(n, max(k, len(slot.spans), least(recipe, n, slot, options or {})))
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


def reductions(
    counts: Sequence[int], slots: Sequence[Slot], recipe: Recipe, options: Mapping[str, Any], unit: int
) -> tuple[Reduction, ...]:
    """The counts as reductions, one per segment; steps that remove nothing are left out. Raises: BudgetError."""
    out = []
    current = list(slots[0].left)
    for slot, k in zip(slots, counts):
        if not len(current) <= k <= sum(current):
            raise BudgetError(f"block {slot.block.index}: {sum(current)} tokens come in, {k} cannot be left")
        for i, (n, want, (start, stop)) in enumerate(zip(list(current), apportion(k, current), slot.spans)):
            lowest = least(recipe, n, slot, options)
            if want < lowest:
                raise BudgetError(
                    f"block {slot.block.index}: {recipe.name!r} cannot go from {n} to {want} tokens in one step, only to "
                    f"{lowest}; spread the budget over more blocks (where=...) or raise it"
                )
            if want < n:
                tail = slot.stage.length - stop * unit
                out.append(Reduction(slot.block.index, n, want, slot.place, start * unit, tail, unit, slot.block.path))
            current[i] = want
    return tuple(out)


def fit_plan(plan: Plan, structure: Structure) -> tuple[Reduction, ...]:
    """A plan passed back by the user, checked against the model. Raises: PlanError."""
    current: dict[tuple[int, int], int] = {}
    out: list[Reduction] = []
    for name, allowed in (("outputs", OUTPUTS), ("recover", RECOVER)):
        if getattr(plan, name) not in allowed:
            raise PlanError(f"the plan's {name}={getattr(plan, name)!r} is none of {', '.join(map(repr, allowed))}")
    if [r.block for r in plan.reductions] != sorted(r.block for r in plan.reductions):
        raise PlanError("the plan's reductions are not in the order of their blocks")
    for r in plan.reductions:
        block = one_block(structure.blocks, r.block)
        if r.unit < 1 or r.prefix < 0 or r.suffix < 0 or r.prefix % r.unit or block.stage.length % r.unit:
            raise PlanError(
                f"the plan at block {r.block}: prefix {r.prefix}, suffix {r.suffix} and groups of {r.unit} do not fit its "
                f"{block.stage.length} tokens"
            )
        key = (block.stage.length, r.prefix)
        shorter = (block.stage.length - r.prefix - r.suffix) // r.unit
        if out and one_block(structure.blocks, out[-1].block).stage is not block.stage and r.n < shorter:
            shorter = r.n  # tokens are gone before this stage begins; the rewrite checks that it is so
        n = current.get(key, shorter)
        if not 1 <= r.k <= n:
            raise PlanError(f"the plan leaves {r.k} tokens at block {r.block}, where {n} come in")
        if r.n != n and key not in current:
            raise PlanError(f"the plan says {r.n} tokens come into block {r.block}; the model has {n}")
        if r.place not in ("attention", "block"):
            raise PlanError(f"the plan's place {r.place!r} is neither 'attention' nor 'block'")
        if block.why_not:
            raise PlanError(f"tokens cannot be reduced in block {r.block} ({block.path}): {block.why_not}")
        current[key] = r.k
        if r.k < n:
            out.append(replace(r, n=n, path=block.path))
    return tuple(out)
