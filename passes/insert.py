"""Insert: a reduction becomes a node of the new graph, and what it leaves a space of the token axis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from tokcompile.errors import MethodError, TokcompileError, UnsupportedGraph, first_line
from tokcompile.passes.ahead import look_ahead
from tokcompile.passes.gather import once
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.groups import put_back, tokens_of_groups
from tokcompile.passes.picks import apart
from tokcompile.passes.reduction import RESULTS, ReductionModule, tap_axis
from tokcompile.passes.renumber import numbers_anew
from tokcompile.passes.segments import folded, side_by_side
from tokcompile.passes.splice import Splice, body, native, standard, text_ranges
from tokcompile.passes.taps import read_taps, taps_of
from tokcompile.passes.tokens import Batch, Label, Seq, Space, make_seq, normal, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

Given = list[Any]  # what goes into a reduction: the stream, the sizes of its tokens or None, and taps


def insert(rw: Rewriter, run: Sequence[Splice]) -> None:
    """Reduces the value of a node; all that is read from it afterwards is shorter. run: one reduction, or those of segments
    side by side that are alike."""
    s, count = run[0], len(run)
    x, label = rw.env[s.at], rw.labels.get(s.at)
    rw.before.setdefault(s.at, (x, label))
    if not s.k:
        drop(rw, s)
        return
    bodies = [body(one, label) for one in run]
    before, after = bodies[0][1], bodies[-1][2]
    rows = s.unit if s.aligned else 1
    start = make_seq(before).new * rows
    tap_start = make_seq(body(s, rw.before[s.at][1])[1]).new * rows
    stream = standard(rw, x, s.block)
    above = [parent.groups if parent and not s.aligned else parent for parent, *_ in bodies]
    sizes = [space.size for space in above if space and space.size]
    with look_ahead(rw, s) if s.recipe.ahead else nullcontext(), overhead(rw):
        taps = read_taps(rw, s)
    given = [stream, side_by_side(rw, sizes) if sizes else None, *taps]
    node, module = call(rw, run, given, start, tap_start)
    new = rw.builder.emit(operator.getitem, node, 0)
    spaces = left_by(rw, run, node, module, above)
    left = [p if s.aligned else tokens_of_groups(rw, p, s.unit, parent) for p, (parent, *_) in zip(spaces, bodies)]
    if taken_apart(run):
        batch, length, width = shape(new)
        new = rw.gather.reshape(new, [batch // count, count * length, width])
        new = put_back(rw, stream, new, start, start + count * s.site.n * s.unit)
    rw.env[s.at] = native(rw, new, s.block)
    rw.labels[s.at] = label_after(rw, s, make_seq([*before, *left, *after]))
    rw.full.pop(s.at, None)


def drop(rw: Rewriter, s: Splice) -> None:
    """All tokens of a span go, and no method is asked: what stands around them is left, as slices of the stream."""
    x, axis = rw.env[s.at], s.block.token_axis
    above, before, after = body(s, rw.labels.get(s.at))
    start, stop = (make_seq(parts).new for parts in (before, [*before, above or s.site.n]))
    pieces = [(a, b) for a, b in ((0, start), (stop, shape(x)[axis])) if a < b]
    kept = [rw.builder.emit(aten.slice.Tensor, x, axis, a, b) for a, b in pieces]
    none = rw.builder.constant(torch.empty(s.batch, 0, dtype=torch.int64), "none")
    space = Space(f"s{len(rw.spaces)}", s.site.n, 0, above, none, renumber=numbers_anew(rw, s), drops=True, start=s.prefix)
    space.gone = rw.builder.emit(aten.slice.Tensor, x, axis, start, stop)
    rw.spaces.append(space)
    rw.env[s.at] = kept[0] if len(kept) == 1 else rw.builder.emit(aten.cat.default, kept, axis)
    rw.labels[s.at] = label_after(rw, s, make_seq([*before, space, *after]))
    rw.full.pop(s.at, None)


def taken_apart(run: Sequence[Splice]) -> bool:
    """Whether only the tokens to reduce go into the module, and not all of the stream: segments are a batch then, and groups
    beside single tokens can be counted."""
    return len(run) > 1 or not run[0].aligned


@contextmanager
def overhead(rw: Rewriter) -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of what is added meanwhile as the reductions' own."""
    with FlopCounterMode(display=False) as counter:
        yield counter
    rw.overhead_flops += counter.get_total_flops()


def call(rw: Rewriter, run: Sequence[Splice], given: Given, start: int, tap_start: int) -> tuple[Node, ReductionModule]:
    """The node of a run, and its module. start, tap_start: where its tokens begin in the stream and in the taps.

    Raises: MethodError that names the method where its plan fails on fake tensors.
    """
    s, count = run[0], len(run)
    name = f"reduction_{len(rw.spaces)}_{s.recipe.name}"
    begins = (0, 0) if taken_apart(run) else (start, tap_start)
    site = replace(s.site, start=begins[1] // s.unit, text=text_ranges(rw, s), segments=count)
    module = ReductionModule(s.recipe, site, s.unit, taps_of(rw, s), *begins, s.block.index)
    rw.builder.root.add_module(name, module)
    if taken_apart(run):
        (stream, size, *taps), length, axes = given, s.site.n * s.unit, map(tap_axis, module.names)
        given = [folded(rw, stream, 1, start, count, length), size]
        given += [t if axis is None else folded(rw, t, axis, tap_start, count, length) for t, axis in zip(taps, axes)]
    key = kind_of(s, given)
    if key in rw.reduced:
        return rw.reduced[key].again(rw, name, module, given), module
    try:
        with overhead(rw) as counter:
            node = rw.builder.emit(name, *given)
        rw.reduced[key] = Seen(node.meta["val"], module.ordered, counter.get_total_flops())
        return node, module
    except TokcompileError:
        raise
    except Exception as error:
        raise MethodError(
            f"the plan of method {s.recipe.name!r} fails when {s.site.n} tokens are to become {s.k} "
            f"(block {s.block.index}): {first_line(error)}; plans must not look at "
            "values of tensors, and every shape must follow from the site"
        ) from error


def kind_of(s: Splice, given: Given) -> tuple[Any, ...]:
    """What the sizes of a reduction's results depend on, where it is one of many segments of a stream."""
    x, fakes = given[0].meta["val"], [n if n is None else n.meta["val"] for n in given[1:]]
    read = tuple(f if f is None else (tuple(f.shape), f.dtype) for f in fakes)
    return id(s.recipe), s.at, s.k, s.unit, s.aligned, s.site.n, s.site.grid, x.shape[0], x.dtype, read


@dataclass(frozen=True)
class Seen:
    """What came out of a reduction on fake tensors, its FLOPs with it: windows and images in one stream are alike."""

    results: tuple[Any, ...]
    ordered: bool | None
    flops: int

    def again(self, rw: Rewriter, name: str, module: ReductionModule, given: Given) -> Node:
        """The node of one like it."""
        x = given[0].meta["val"]
        batch, length, width = x.shape
        with rw.builder.mode:
            left = length - (module.site.n - module.site.k) * module.unit
            new = torch.empty((batch, left, width), dtype=x.dtype, device=x.device)
        module.ordered = self.ordered
        rw.overhead_flops += self.flops
        return rw.builder.known((new, *self.results[1:]), name, *given)


def left_by(
    rw: Rewriter, run: Sequence[Splice], node: Node, module: ReductionModule, above: Sequence[Space | None]
) -> list[Space]:
    """What a run left of the spaces above it, one for each of its reductions."""
    results, count = node.meta["val"], len(run)

    def each(i: int) -> Sequence[Any]:
        """Result i of each reduction, where there is one."""
        given = i < len(results) and results[i] is not None
        return apart(rw.builder, rw.builder.emit(operator.getitem, node, i), count) if given else [None] * count

    assigns = once(lambda: apart(rw.builder, assignment_of(rw, node, module, run[0].site.n), count))

    def slots(i: int) -> Callable[[], Node]:
        return once(lambda: assigns()[i])

    left = []
    for i, (s, parent, index, size, positions) in enumerate(zip(run, above, each(1), each(2), each(len(RESULTS)))):
        space = Space(f"s{len(rw.spaces)}", s.site.n, s.k, parent, index, slots(i), size)
        space.ordered = bool(module.ordered)
        space.proportional = s.recipe.proportional and bool(s.site.options.get("proportional", True))
        space.renumber, space.drops = numbers_anew(rw, s), s.k < s.site.n and not s.recipe.track_size
        space.start = s.prefix if s.unit == 1 else None
        if s.hidden:
            space.hidden = torch.tensor([[i in one for i in range(space.root_n)] for one in map(set, s.hidden)])
        if positions is not None:
            space.positions = positions
            space.bands = tuple(s.site.options.get("sections") or ())
        rw.spaces.append(space)
        left.append(space)
    return left


def assignment_of(rw: Rewriter, node: Node, module: ReductionModule, n: int) -> Node:
    """The fourth result of a reduction, which only dense outputs need: (B, n)."""
    x, index = node.args[0].meta["val"], node.meta["val"][1]
    module.needs_assign = True
    with rw.builder.mode:
        assign = torch.empty(index.shape[0], n, dtype=torch.int64, device=index.device)
    node.meta["val"] = (*node.meta["val"][:3], assign, *node.meta["val"][len(RESULTS) :])
    if not module.recipe.track_size:  # dropped tokens are compared with the kept ones
        rw.overhead_flops += 2 * index.shape[0] * n * index.shape[1] * x.shape[-1]
    return rw.builder.emit(operator.getitem, node, 3)


def label_after(rw: Rewriter, s: Splice, seq: Seq) -> Label:
    """The label of the stream, with `seq` on its token axis."""
    label = list(rw.labels.get(s.at) or plain(shape(s.at)))
    label[s.block.token_axis] = normal((seq, s.unit if s.aligned else 1))
    if s.block.batch_axis is not None and s.batch > 1:
        label[s.block.batch_axis] = (Batch(s.batch),)
    return tuple(label)


def check_positions(rw: Rewriter) -> None:
    """Raises: UnsupportedGraph where no rotary table was found for tokens with several positions, or with new ones."""
    lost = next((s for s in rw.spaces if s.positions is not None and s not in rw.positioned), None)
    texts = [s for many in rw.splices.values() for s in many if s.language]
    if lost is not None and texts:
        raise UnsupportedGraph(
            f"method {texts[0].recipe.name!r} gives each token several positions, and no rotary table is multiplied to "
            "the tokens after it",
            texts[0].at,
            "positions=1 gives each token one position",
        )
    asked = [s for many in rw.splices.values() for s in many if s.site.options.get("renumber")]
    if asked and not any(space.renumber and space in rw.positioned for space in rw.spaces):
        raise UnsupportedGraph(
            f"{asked[0].recipe.name} was asked to number the tokens that it leaves anew, and no rotary table over "
            "consecutive positions is multiplied to them afterwards",
            asked[0].at,
            "leave renumber out: tokens then keep their positions",
        )
