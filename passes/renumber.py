"""Renumber: tokens that are numbered anew after a reduction, without gaps, as in a prompt that never had the dropped ones.

Rotary embeddings only see how far apart two tokens are. So the new numbers are the last ones of the prompt, not the first:
text after the image keeps its positions, what comes before moves up, and decoding goes on where it would have anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.errors import InputError
from tokcompile.passes.fixed import computed_by, program_of, read_by, value_of
from tokcompile.passes.gather import Gatherer, samples
from tokcompile.passes.graph import aten, packet, shape
from tokcompile.passes.heads import is_table, rotates
from tokcompile.passes.memory import ancestors_of
from tokcompile.passes.tokens import Label, Seq, Space, plain, tokens_of

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter
    from tokcompile.passes.rules.core import Call
    from tokcompile.passes.splice import Splice

STEADY = 0.05  # of a table's largest entry: bfloat16 entries are off by a tenth of it, another order of positions by more


@dataclass(frozen=True)
class Consecutive:
    """What renumbering takes for granted of positions that come from inputs: from token `start` to `stop` they go on by one.

    program: computes them from the flat inputs; name: of what they come from.
    """

    program: GraphModule
    name: str
    start: int
    stop: int

    @property
    def guard(self) -> str:
        return f"{self.name} goes on by one from token {self.start} to {self.stop}, as tokens are numbered anew there"

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError."""
        if not without_gaps(computed_by(self.program, inputs), self.start, self.stop):
            raise InputError(
                f"{self.name} has gaps between the tokens {self.start} and {self.stop}, and here tokens are numbered anew, as "
                "if there were none\n  what to do: optimize with renumber=False, which keeps positions as they are"
            )


def last_rows(call: Call, name: str, label: Label) -> Node | None:
    """A rotary table that is multiplied to tokens which were numbered anew; None for any other operand."""
    if packet(call.node) != "aten.mul" or call.labelled(name):
        return None
    node = call.old_args[name]
    sizes = shape(node)
    seqs = [tokens_of(axis) for axis in label[len(label) - len(sizes) :]]
    axis, seq = next(((i, s) for i, s in enumerate(seqs) if s is not None), (0, None))
    base = numbered(seq) if seq is not None else None
    rw = call.rewriter
    if seq is None or base is None or rows_axis(node, seq.old) != axis or not in_sequence(rw, node, axis):
        return None
    rw.positioned.update(source for space in seq.spaces for source in sources(space))
    for place in whole_numbers(node):
        if place not in rw.checks and (names := names_behind(place)):
            rw.checks[place] = Consecutive(program_of(rw.old, place), names, *reach(rw, seq.old))
    rows = call.op(aten.slice.Tensor, call[name], axis, base.old - base.new, base.old)
    have = list(plain(sizes))
    have[axis] = (base,)
    return call.coerce_node(rows, tuple(have), label)


def numbered(seq: Seq) -> Seq | None:
    """The token axis as it was when its tokens were last numbered anew; None where they never were."""
    anchors = [part.anchor() if isinstance(part, Space) else None for part in seq.parts]
    if not any(anchors):
        return None
    plain_sizes = (part.root_n if isinstance(part, Space) else part for part in seq.parts)
    return Seq(tuple(anchor or size for anchor, size in zip(anchors, plain_sizes)))


def sources(space: Space) -> list[Space]:
    """A space, its ancestors, and those whose tokens it lays out anew."""
    own = space.lineage()
    return own + [s for one in own for source in one.sources if isinstance(source, Space) for s in sources(source)]


def as_numbered(g: Gatherer, label: Label) -> Label:
    """What a table over pairs of tokens, a causal mask above all, is restricted to: where tokens were numbered anew in another
    order than before, it takes them for the last ones of their span, since the new order is what counts."""
    if len(label) < 2 or not all(any(isinstance(a, Seq) for a in axis) for axis in label[-2:]):
        return label
    return (*label[:-2], *(tuple(in_new_order(g, a) if isinstance(a, Seq) else a for a in axis) for axis in label[-2:]))


def in_new_order(g: Gatherer, seq: Seq) -> Seq:
    return Seq(tuple(twin(g, p) if isinstance(p, Space) and shuffled_anew(p) else p for p in seq.parts))


def shuffled_anew(space: Space) -> bool:
    return space.anchor() is not None and not all(s.ordered for s in space.lineage())


def twin(g: Gatherer, space: Space) -> Space:
    """The same number of tokens, which stand for the last ones of the span; of a later reduction, for those it chose."""
    if space not in g.twins:
        if space.renumber:
            n, batch = space.root_n, samples(Seq((space,)))
            g.twins[space] = Space(f"{space.name}_n", n, space.k, index=g.arange(n - space.k, n, batch))
        else:
            assert space.parent is not None, "an ancestor was numbered anew"
            g.twins[space] = replace(space, parent=twin(g, space.parent))
    return g.twins[space]


def numbers_anew(rw: Rewriter, s: Splice) -> bool:
    """Whether the tokens of a stream get new positions after a reduction: where the user says so; where the method does,
    only if all rotary tables further on are of consecutive positions, since there is no telling what else they would be."""
    asked = s.site.options.get("renumber")
    if asked is not None or not (s.language and s.recipe.renumber(s.site.step, s.site.options)):
        return bool(asked)
    length = shape(s.at)[s.block.token_axis]
    here = rw.structure.order[s.at]
    later = (n for n in rw.old.graph.nodes if packet(n) == "aten.mul" and rw.structure.order[n] > here and rotates(n))
    tables = {(n, axis) for node in later for n in node.all_input_nodes for axis in [rows_axis(n, length)] if axis is not None}
    return bool(tables) and all(in_sequence(rw, n, axis) for n, axis in tables)


def rows_axis(node: Node, length: int) -> int | None:
    """Along which axis a rotary table has a row for each of so many tokens; None where it is no such table."""
    sizes = shape(node)
    axis = next((i for i in reversed(range(len(sizes) - 1)) if sizes[i] == length), None)  # the batch may be as large
    return axis if axis is not None and sizes[-1] > 1 and is_table(node) else None


def in_sequence(rw: Rewriter, node: Node, axis: int) -> bool:
    """Whether the rows of a rotary table are those of positions that go on by one."""
    if node not in rw.in_sequence:
        rw.in_sequence[node] = follows_on(rw, node, axis)
    return rw.in_sequence[node]


def follows_on(rw: Rewriter, node: Node, axis: int) -> bool:
    inputs = rw.old.graph.find_nodes(op="placeholder")
    program = program_of(rw.old, node)
    table = None if read_by(program, inputs) else value_of(program, inputs)
    if table is not None:
        return steady(table, axis)
    places = whole_numbers(node)
    long = [[size for size in shape(p) if size != 1] for p in places]
    if not long or any(len(sizes) not in (1, 2) or sizes[-1] != shape(node)[axis] for sizes in long):
        return False
    examples = [value_of(program_of(rw.old, place), rw.inputs) for place in places]
    start, stop = reach(rw, shape(node)[axis])
    return all(value is None or without_gaps(value, start, stop) for value in examples)


def whole_numbers(node: Node) -> list[Node]:
    """The whole numbers that a table of floats is computed from."""
    inside = ancestors_of({node})
    return [n for n in inside if is_whole(n) and any(u in inside and not is_whole(u) for u in n.users)]


def names_behind(place: Node) -> str:
    """The inputs that positions are computed from."""
    return ", ".join(sorted(n.name for n in ancestors_of({place}) if n.op == "placeholder"))


def is_whole(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def reach(rw: Rewriter, length: int) -> tuple[int, int]:
    """Where, among so many original tokens, the first span begins that is reduced and the last one ends."""
    splices = [s for many in rw.splices.values() for s in many if shape(s.at)[s.block.token_axis] == length]
    spans = [(s.prefix, length - s.site.suffix * s.unit) for s in splices] or [(0, length)]
    return min(start for start, _ in spans), max(stop for _, stop in spans)


def without_gaps(places: Tensor, start: int, stop: int) -> bool:
    """Whether positions, one number for each token in whatever view, go on by one."""
    return bool((places.squeeze()[..., start:stop].diff(dim=-1) == 1).all())


def steady(table: Tensor, axis: int) -> bool:
    """Whether each channel is a sine or cosine of an angle that grows by as much from row to row: then the rows before and
    after any one add up to a multiple of it, by the same factor everywhere."""
    rows = table.movedim(axis, 0).flatten(1).double()
    middle, around = rows[1:-1], rows[:-2] + rows[2:]
    factor = (middle * around).sum(0) / middle.square().sum(0).clamp(min=1e-12)
    return bool((around - factor * middle).abs().amax() <= STEADY * rows.abs().amax()) if len(middle) else True
