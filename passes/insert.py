"""Insert: a reduction becomes a node of the new graph, and what it leaves a space of the token axis."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from tokcompile.errors import MethodError, TokcompileError, UnsupportedGraph
from tokcompile.passes.ahead import look_ahead
from tokcompile.passes.gather import once
from tokcompile.passes.graph import aten, shape
from tokcompile.passes.groups import put_back, taken_out, tokens_of_groups
from tokcompile.passes.reduction import RESULTS, ReductionModule
from tokcompile.passes.renumber import numbers_anew
from tokcompile.passes.splice import Splice, body, native, standard, text_ranges
from tokcompile.passes.taps import read_taps, taps_of
from tokcompile.passes.tokens import Batch, Label, Seq, Space, make_seq, normal, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter


def insert(rw: Rewriter, s: Splice) -> None:
    """Reduces the value of a node; all that is read from it afterwards is shorter."""
    x, label = rw.env[s.at], rw.labels.get(s.at)
    rw.before.setdefault(s.at, (x, label))
    parent, before, after = body(s, label)
    rows = s.unit if s.aligned else 1
    start = make_seq(before).new * rows
    tap_start = make_seq(body(s, rw.before[s.at][1])[1]).new * rows
    stream = standard(rw, x, s.block)
    above = parent.groups if parent and not s.aligned else parent
    with look_ahead(rw, s) if s.recipe.ahead else nullcontext(), overhead(rw):
        taps = read_taps(rw, s)
    node, module = call(rw, s, stream, above.size if above else None, taps, start, tap_start)
    new = rw.builder.emit(operator.getitem, node, 0)
    space = left_by(rw, s, node, module, above)
    rw.spaces.append(space)
    left = space if s.aligned else tokens_of_groups(rw, space, s.unit, parent)
    if not s.aligned:
        new = put_back(rw, stream, new, start, start + s.site.n * s.unit)
    rw.env[s.at] = native(rw, new, s.block)
    rw.labels[s.at] = label_after(rw, s, make_seq([*before, left, *after]))
    rw.full.pop(s.at, None)


@contextmanager
def overhead(rw: Rewriter) -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of what is added meanwhile as the reductions' own."""
    with FlopCounterMode(display=False) as counter:
        yield counter
    rw.overhead_flops += counter.get_total_flops()


def call(
    rw: Rewriter, s: Splice, stream: Node, size: Node | None, taps: list[Node], start: int, tap_start: int
) -> tuple[Node, ReductionModule]:
    """The node of a reduction, and its module. start, tap_start: where its tokens begin in the stream and in the taps.

    Raises: MethodError that names the method where its plan fails on fake tensors.
    """
    name = f"reduction_{len(rw.spaces)}_{s.recipe.name}"
    begins = (start, tap_start) if s.aligned else (0, 0)
    site = replace(s.site, start=begins[1] // s.unit, text=text_ranges(rw, s))
    module = ReductionModule(s.recipe, site, s.unit, taps_of(rw, s), *begins)
    rw.builder.root.add_module(name, module)
    if not s.aligned:  # single tokens stand beside the groups, which are taken out of the stream
        length = s.site.n * s.unit
        stream = rw.builder.emit(aten.slice.Tensor, stream, 1, start, start + length)
        taps = taken_out(rw, module.names, taps, tap_start, length)
    key = kind_of(s, stream, size, taps)
    if key in rw.reduced:
        return rw.reduced[key].again(rw, name, module, stream, size, taps), module
    try:
        with overhead(rw) as counter:
            node = rw.builder.emit(name, stream, size, *taps)
        rw.reduced[key] = Seen(node.meta["val"], module.ordered, counter.get_total_flops())
        return node, module
    except TokcompileError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise MethodError(
            f"the plan of method {s.recipe.name!r} fails when {s.site.n} tokens are to become {s.k} "
            f"(block {s.block.index}): {type(error).__name__}: {first}; plans must not look at "
            "values of tensors, and every shape must follow from the site"
        ) from error


def kind_of(s: Splice, stream: Node, size: Node | None, taps: list[Node]) -> tuple[Any, ...]:
    """What the sizes of a reduction's results depend on, where it is one of many segments of a stream."""
    fakes = [n.meta["val"] for n in (size, *taps) if n is not None]
    read = tuple((tuple(f.shape), f.dtype) for f in fakes)
    return id(s.recipe), s.at, s.k, s.unit, s.aligned, s.site.n, s.site.grid, size is None, stream.meta["val"].dtype, read


@dataclass(frozen=True)
class Seen:
    """What came out of a reduction on fake tensors, its FLOPs with it: windows and images in one stream are alike."""

    results: tuple[Any, ...]
    ordered: bool | None
    flops: int

    def again(
        self, rw: Rewriter, name: str, module: ReductionModule, stream: Node, size: Node | None, taps: list[Node]
    ) -> Node:
        """The node of one like it."""
        batch, length, width = shape(stream)
        with rw.builder.mode:
            left = length - (module.site.n - module.site.k) * module.unit
            new = torch.empty((batch, left, width), dtype=stream.meta["val"].dtype, device=stream.meta["val"].device)
        module.ordered = self.ordered
        rw.overhead_flops += self.flops
        return rw.builder.known((new, *self.results[1:]), name, stream, size, *taps)


def left_by(rw: Rewriter, s: Splice, node: Node, module: ReductionModule, above: Space | None) -> Space:
    """What a reduction left of the space above it."""
    results = node.meta["val"]
    space = Space(f"s{len(rw.spaces)}", s.site.n, s.k, above, rw.builder.emit(operator.getitem, node, 1))
    space.size = rw.builder.emit(operator.getitem, node, 2) if results[2] is not None else None
    space.assign = once(lambda: assignment_of(rw, node, module, space.n))
    space.proportional = s.recipe.proportional and bool(s.site.options.get("proportional", True))
    space.ordered = bool(module.ordered)
    space.renumber = numbers_anew(rw, s)
    if s.hidden:
        space.hidden = torch.tensor([[i in one for i in range(space.root_n)] for one in map(set, s.hidden)])
    if len(results) > len(RESULTS):
        space.positions = rw.builder.emit(operator.getitem, node, len(RESULTS))
        space.bands = tuple(s.site.options.get("sections") or ())
    return space


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
