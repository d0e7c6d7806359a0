"""Three oracles that need no reference code: does the pass understand this model?

Permutation: all tokens are kept, in random order; every output must be what it was. Masked keys: half the tokens are
dropped; the kept ones must be what the original graph gives when nobody may attend to the dropped ones. Copies: half the
tokens are replaced by copies of the others, positions included; merging each with its copies must change no output.
Parameters are shaken first, because zero-initialised tables and tiny layer scales would hide a missing step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.compiler import Analysis, Settings, rewrite
from tokcompile.errors import TokcompileError, UnsupportedGraph
from tokcompile.masked import MaskedRun, kept_rows
from tokcompile.passes.crop import among_shown
from tokcompile.passes.faithful import worst
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.graph import packet, shape
from tokcompile.passes.layout import Layout, NeedsLayout, with_layout
from tokcompile.passes.memory import reachable_from
from tokcompile.passes.places import make_slot, no_blocks, one_block, visual_blocks
from tokcompile.passes.plan import Reduction
from tokcompile.passes.rewrite import Rewritten
from tokcompile.passes.tokens import Space, is_labelled
from tokcompile.passes.trace import one_at_a_time, trace
from tokcompile.passes.weighing import ADDS
from tokcompile.passes.weighted import weights
from tokcompile.primitives import identity
from tokcompile.recipe import Keep, Merge, Recipe, Site, Tokens, anywhere
from tokcompile.shaken import noise_floor, prepare, run

LOOSE = 1e-2


@dataclass
class Result:
    """One oracle at one block. error: largest difference relative to the output's scale, None where nothing compares."""

    oracle: str
    block: int
    path: str
    error: float | None
    ok: bool
    note: str = ""


@dataclass
class Check:
    """The outcome: ok, one row per oracle and depth, the sites found, and what was refused or not recognised.

    tolerance: the largest error that counts as rounding; above LOOSE in low precision and where the model amplifies it.
    """

    ok: bool
    results: list[Result] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    unrecognised: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    tolerance: float = 0.0

    @property
    def errors(self) -> list[str]:
        return [f"{r.oracle} at block {r.block} ({r.path}): {r.note or r.error}" for r in self.results if not r.ok]

    def json(self) -> str:
        return json.dumps({**asdict(self), "errors": self.errors}, indent=2)

    def __str__(self) -> str:
        lines = [f"{'oracle':<14}{'block':>6}  {'error':>9}  result"] if self.results else []
        for r in self.results:
            error = "-" if r.error is None else f"{r.error:.1e}"
            lines.append(
                f"{r.oracle:<14}{r.block:>6}  {error:>9}  {'ok' if r.ok else 'FAILED'}{'  ' + r.note if r.note else ''}"
            )
        if self.results:
            loose = " (rounding alone changes that much here: smaller mistakes cannot be seen)" * (self.tolerance > LOOSE)
            lines.append(f"tolerance: {self.tolerance:.1e}{loose}")
        lines.append(f"sites: {len(self.sites)}" + (f" ({self.sites[0]} .. {self.sites[-1]})" if self.sites else ""))
        lines += [f"not recognised: {text}" for text in self.unrecognised]
        lines += [f"fixed while tracing: {text}" for text in self.guards]
        inside = any("recover='anywhere'" in r.note for r in self.results)
        understood = "the pass understands this model" + inside * (
            ", but tokens have to be given back inside its blocks (recover='anywhere'); a report's FLOPs say what that costs"
        )
        refused = "does NOT understand this model" if self.results else "finds nothing to reduce in this model"
        lines.append(understood if self.ok else f"the pass {refused}")
        return "\n".join(lines)


@one_at_a_time
def check(
    model: Any,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> Check:
    """Runs the oracles at the first, a middle and the last block (or at `blocks`) on a copy with shaken parameters: permutation
    and masked keys at each, copies at the first one of a tower and of a language model, since all that follows weighs them.

    Raises: InputError, TraceError where the model cannot be traced at all.

    Example:
        >>> import torch, tokcompile
        >>> from torch import nn
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 4).eval()
        >>> tokcompile.check(model, (torch.randn(2, 50, 32),)).ok
        True
    """
    traced = trace(model, args, kwargs)
    analysis, outputs = prepare(traced, seed)
    graph = analysis.graph
    if not analysis.structure.blocks:
        return Check(False, [], [], [str(no_blocks(analysis.structure))], analysis.guards)
    tolerance = noise_floor(graph, traced.inputs, outputs, seed)
    drift = worst(outputs, run(traced.gm, traced.inputs))
    if drift > tolerance:
        raise TokcompileError(
            f"the canonical form of this graph differs from the traced one by {drift:.1e}: "
            "a bug in tokcompile.passes.canonicalise"
        )
    structure = analysis.structure
    report = Check(True, [], [b.path for b in structure.sites()], list(structure.unrecognised), analysis.guards, tolerance)
    report.unrecognised += [f"block {b.index} ({b.path}): {b.why_not}" for b in structure.blocks if b.why_not]
    try:
        sites = places(structure, spans)
    except TokcompileError as error:
        sites, report.unrecognised = [], [*report.unrecognised, str(error)]
    if not sites:
        report.ok = False
    chosen = [one_block(structure.blocks, b) for b in blocks] if blocks is not None else sites
    first = {b.language: b.index for b in reversed(chosen)}
    for block in chosen:
        for oracle in ORACLES:
            if oracle is copies and blocks is None and block.index != first[block.language]:
                continue
            result = Result(oracle.__name__.replace("_", " "), block.index, block.path, None, False)
            try:
                if block.why_not:
                    raise UnsupportedGraph(block.why_not, block.mid)
                compare(result, oracle, analysis, block, spans, outputs, seed, tolerance)
            except TokcompileError as error:
                result.note = str(error)
            report.results.append(result)
            report.ok &= result.ok
    return report


def places(structure: Structure, spans: Sequence[tuple[int, int]] | None) -> list[Block]:
    """A first, a middle and a last block of the vision tower, and of the language model where its visual tokens are known."""
    chosen: dict[int, Block] = {}
    for language in (False, True) if structure.blocks else ():
        sites = [b for b in visual_blocks(structure, spans, language) if not b.why_not]
        chosen |= {sites[i].index: sites[i] for i in depths(len(sites))}
    return list(chosen.values())


def depths(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1}) if count else []


def compare(
    result: Result,
    oracle: Any,
    analysis: Analysis,
    block: Any,
    spans: Any,
    outputs: list[Any],
    seed: int,
    tolerance: float,
) -> None:
    """Fills in one row. A model that keeps tokens in groups or in segments is compared on whole groups and segments."""

    def attempt(layout: Layout) -> None:
        laid = analysis.laid_out(layout)
        slot = make_slot(one_block(laid.structure.blocks, block.index), "attention", spans, layout)
        oracle(result, laid, slot, layout, outputs, seed)

    with_layout(attempt, give_back=True)
    result.ok = result.error is None or result.error <= tolerance


def reduced_to(slot: Any, share: float) -> list[Reduction]:
    """One reduction per segment at that place, to `share` of its tokens."""
    return [
        Reduction(
            slot.block.index,
            stop - start,
            max(1, int((stop - start) * share)),
            "attention",
            slot.token(start),
            slot.stage.length - slot.token(stop),
            slot.unit,
        )
        for start, stop in slot.spans
    ]


def rewritten(result: Result, analysis: Analysis, settings: Settings, reductions: list[Reduction], layout: Layout) -> Rewritten:
    """Recovery at the end if that is enough; else anywhere, and the row says so."""
    try:
        return rewrite(analysis, settings, reductions, layout)
    except NeedsLayout:
        raise
    except TokcompileError as error:
        settings.recover = "anywhere"
        out = rewrite(analysis, settings, reductions, layout)
        inside = sum(r.inside for r in out.recoveries)
        places = f"{inside} place{'s' * (inside != 1)} inside the blocks"
        result.note = f"only with recover='anywhere', at {places}: {first_reason(error)}"
        return out


def first_reason(error: TokcompileError) -> str:
    return str(error).splitlines()[0].split(" (")[0].removeprefix("an op over reduced tokens cannot be rewritten: ")


def permutation(result: Result, analysis: Analysis, slot: Any, layout: Layout, outputs: list[Any], seed: int) -> None:
    settings = Settings(shuffled(seed), {})
    out = rewritten(result, analysis, settings, reduced_to(slot, 1.0), layout)
    result.error = worst(run(out.gm, analysis.traced.inputs), outputs)


def masked_keys(result: Result, analysis: Analysis, slot: Any, layout: Layout, outputs: list[Any], seed: int) -> None:
    settings = Settings(subset(seed), {}, outputs="reduced")
    chosen = reduced_to(slot, 0.5)
    out = rewritten(result, analysis, settings, chosen, layout)
    pairs = kept_pairs(analysis, out, seed)
    if not pairs:
        with extra_outputs(analysis.graph, before_recovery(out)):
            pairs = kept_pairs(analysis, rewrite(analysis, settings, chosen, layout), seed)
        before = "before tokens are mixed along the sequence" if out.mixed else "where tokens are given back"
        where = f"compared {before}" if pairs else "no output can be compared"
        result.note = f"{result.note}; {where}" if result.note else where
    result.error = worst([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def copies(result: Result, analysis: Analysis, slot: Any, layout: Layout, outputs: list[Any], seed: int) -> None:
    """Where merging is refused, nothing is compared: what can be pruned is understood."""
    if table_in_weights(analysis):
        result.note = "not compared: a table by position is added to weights of attention"
        return
    settings = Settings(copied(seed), {}, recipes={"merged": merged(seed)})
    placed = reduced_to(slot, 1.0)
    apart = rewritten(result, analysis, settings, placed, layout)
    if any(space.hidden is not None for space in apart.spaces):
        result.note = "not compared: some tokens make way before all others"
        return
    merging = [*placed, *(replace(r, method="merged") for r in reduced_to(slot, 0.5))]
    try:
        joined = rewrite(analysis, settings, merging, layout)
    except TokcompileError as error:
        result.note = f"merging is refused: {first_reason(error)}"
        return
    if not joined.mixed:
        result.error = worst(*(run(out.gm, analysis.traced.inputs) for out in (joined, apart)))
        return
    behind = {*joined.mixed, *reachable_from(set(joined.mixed))}  # where a copy is seen twice
    with extra_outputs(analysis.graph, before_recovery(joined)) as nodes:
        both = [rewrite(analysis, settings, chosen, layout) for chosen in (merging, placed)]
    got, want = ([v for node, v in zip(nodes, run(out.gm, analysis.traced.inputs)) if node not in behind] for out in both)
    result.error = worst(got, want) if got else None
    where = "compared before tokens are mixed along the sequence" if got else "no output can be compared"
    result.note = f"{result.note}; {where}" if result.note else where


def table_in_weights(analysis: Analysis) -> bool:
    """Whether a table over all tokens is added to what a softmax has made one, in front of a block: merged tokens get the mean
    over the places of those that they hold, which are not those of copies."""
    axes = weights(analysis.graph.graph).axes
    added = (n for n in analysis.structure.leading if packet(n) in ADDS and any(i in axes for i in n.all_input_nodes))
    return any(i.op == "get_attr" and shape(i)[-1:] == shape(n)[-1:] for n in added for i in n.all_input_nodes)


ORACLES = (permutation, masked_keys, copies)


def kept_pairs(analysis: Analysis, out: Rewritten, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(reduced, masked original at the kept rows) of every output before which no token was given back."""
    reduced = run(out.gm, analysis.traced.inputs)
    kept = {space: kept_in(space, seed) for space in out.spaces}
    masked = MaskedRun(analysis.graph, out, kept)
    with torch.no_grad():
        masked.run(*analysis.traced.inputs)
    return [
        (got, kept_rows(want, label, kept) if label else want)
        for got, want, label, clean in zip(reduced, masked.outputs, out.output_labels, masked.clean)
        if clean and isinstance(got, Tensor) and got.is_floating_point()
    ]


def kept_in(space: Space, seed: int) -> Tensor:
    """(B, k) what the recipe `subset` has to keep there."""
    if space.hidden is None:
        return subset_index(space.n, space.k, shape(space.index)[0], seed, sort=True)
    hidden = tuple(tuple(row.nonzero().flatten().tolist()) for row in space.hidden)
    return among_shown(subset(seed), hidden).plan(Tokens(torch.zeros(len(hidden), space.n, 1)), Site(space.n, space.k)).index


def before_recovery(out: Rewritten) -> list[Node]:
    """The reduced tensors from which tokens were given back, or that went into a mixer."""
    needed = dict.fromkeys(n for node in (*out.recovered, *out.mixed) for n in node.all_input_nodes)
    return [n for n in needed if is_labelled(out.labels.get(n)) and isinstance(n.meta["val"], Tensor)]


@contextmanager
def extra_outputs(gm: GraphModule, nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Lets the graph return these nodes too; gives all that it returns."""
    output = gm.graph.output_node()
    before = output.args
    output.args = ([*before[0], *nodes],)
    try:
        yield list(output.args[0])
    finally:
        output.args = before


def subset_index(n: int, k: int, batch: int, seed: int, sort: bool) -> Tensor:
    """(B, k) random tokens, other ones for every sample."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = [torch.randperm(n, generator=generator)[:k] for _ in range(batch)]
    return torch.stack([r.sort().values if sort else r for r in rows])


def constant_recipe(name: str, seed: int, sort: bool) -> Recipe:
    def plan(tokens: Tokens, site: Site) -> Keep:
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        with disable_proxy_modes_tracing():
            index = subset_index(site.n, site.k, tokens.x.shape[0] // site.segments, seed, sort)
            index = index.repeat_interleave(site.segments, 0)  # segments of one sequence draw alike
        return Keep(index, ordered=sort)

    return Recipe(name, plan, together=anywhere)


def copied(seed: int) -> Recipe:
    """The tokens that are not kept are replaced by copies of those that are."""

    def plan(tokens: Tokens, site: Site) -> Keep:
        kept, gone, slots = draw_copies(tokens, site, seed)
        index = torch.cat([kept, kept.gather(1, slots)], 1).gather(1, torch.cat([kept, gone], 1).argsort(1))
        return Keep(index, ordered=False, assign=identity(tokens.x))

    return Recipe("copies", plan, together=anywhere)


def merged(seed: int) -> Recipe:
    """Each copy is merged into the token that it is a copy of."""

    def plan(tokens: Tokens, site: Site) -> Merge:
        kept, gone, slots = draw_copies(tokens, site, seed)
        more = site.k - kept.shape[1]  # where tokens are hidden, more may be left than are different
        return Merge(torch.cat([kept, gone[:, :more]], 1), gone[:, more:], slots[:, more:])

    return Recipe("merged", plan, track_size=True, proportional=True, together=anywhere)


def draw_copies(tokens: Tokens, site: Site, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n // 2) tokens that are kept, (B, rest) the others, and (B, rest) which of the kept ones each is a copy of."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        batch, count = tokens.x.shape[0] // site.segments, max(1, site.n // 2)
        order = subset_index(site.n, site.n, batch, seed, sort=False)
        kept, gone = (part.sort(1).values for part in order.split([count, site.n - count], 1))
        slots = torch.randint(count, gone.shape, generator=torch.Generator().manual_seed(seed + 2))
        return tuple(part.repeat_interleave(site.segments, 0) for part in (kept, gone, slots))  # type: ignore[return-value]


def shuffled(seed: int) -> Recipe:
    return constant_recipe("permutation", seed, sort=False)


def subset(seed: int) -> Recipe:
    return constant_recipe("subset", seed, sort=True)
