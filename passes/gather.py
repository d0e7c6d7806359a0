"""Gathering along token axes: restricting a full tensor to kept tokens, and giving a reduced one its dropped tokens back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes import picks
from tokcompile.passes.graph import Builder, aten, shape
from tokcompile.passes.tokens import Atom, Axis, Batch, Label, Seq, Space, has_batch, has_tokens, make_seq, new, old


class Gatherer:
    """Emits gathers into the graph under construction; index tensors are built once and shared."""

    def __init__(self, builder: Builder):
        self.b = builder
        self._index: dict[tuple[Seq, Seq], Node] = {}
        self._assign: dict[Seq, Node] = {}
        self._size: dict[Seq, Node] = {}
        self._sample: dict[tuple[Space, range], Space] = {}
        self._coerced: dict[tuple[Node, Label, Label], Node] = {}  # masks and rotary tables are read by every block
        self.stacks: dict[tuple[int | Space, ...], int | Space | None] = {}  # see passes/batch.py
        self.channels: dict[tuple[Seq, int, bool], Node] = {}  # see passes/rotary.py
        self.twins: dict[Space, Space] = {}  # see passes/renumber.py

    # -- index tensors of whole token axes ---------------------------------------------------------------------------

    def index(self, have: Seq | int, want: Seq) -> Node:
        """(B, new) positions, within an axis typed `have` (an int: the full old axis), of the tokens of `want`."""
        parts = have.parts if isinstance(have, Seq) else want.old_sizes
        have = make_seq(parts) if isinstance(have, Seq) else Seq(tuple(parts))
        if want.spaces and not any(space.k for space in want.spaces):  # all that is left is text
            edges = [0, *accumulate(length(part) for part in parts)]
            places = [torch.arange(a, b) for a, b, target in zip(edges, edges[1:], aligned(parts, want)) if length(target)]
            return self.b.constant(torch.cat(places).expand(samples(want), -1).contiguous(), "positions")
        if (have, want) not in self._index:
            pieces, targets = [], aligned(parts, want)
            starts = [0, *accumulate(map(length, parts))]
            for run in picks.runs(targets, parts):
                target, start = targets[run[0]], starts[run[0]]
                if not length(target):
                    continue
                if len(run) > 1:
                    inside = slice(run.start, run.stop)
                    wide = picks.within(self.b, targets[inside], parts[inside])
                    pieces.append(picks.end_to_end(self.b, wide, starts[run.start : run.stop]))
                elif isinstance(target, Space) and target is not parts[run[0]]:
                    pieces.append(self.shifted(self.within(parts[run[0]], target), start))
                else:
                    pieces.append(self.arange(start, starts[run.stop], samples(want)))
            self._index[have, want] = self.b.cat(pieces, 1)
        return self._index[have, want]

    def within(self, ancestor: int | Space, space: Space) -> Node:
        """(B, k) positions of the tokens of `space` among those of an ancestor (an int: the root)."""
        if isinstance(ancestor, Space) and ancestor not in space.lineage():
            raise UnsupportedGraph(f"tokens of two unrelated reductions meet: {ancestor} and {space}")
        assert space.index is not None
        if space.parent is None or space.parent is ancestor:
            return space.index
        return self.b.emit(aten.gather.default, self.within(ancestor, space.parent), 1, space.index)

    def several(self, space: Space) -> Node | None:
        """(B, k, P) positions, among the root's tokens, of tokens that have several; None for those that have one."""
        if space.parent is None:
            return space.positions
        base = self.several(space.parent)
        if base is None and space.positions is None:
            return None
        count = shape(space.positions if base is None else base)[2]
        if base is None:
            base = self.spread(self.within(space.root_n, space.parent), count)
        assert space.index is not None
        own = self.spread(space.index, count) if space.positions is None else space.positions
        return self.b.emit(aten.gather.default, base, 1, own)

    def spread(self, index: Node, width: int) -> Node:
        """(B, k) as (B, k, width)."""
        return self.b.emit(aten.expand.default, self.b.emit(aten.unsqueeze.default, index, 2), [*shape(index), width])

    def assign(self, seq: Seq) -> Node:
        """(B, old) positions, within the reduced axis, of the token that stands for each original one."""
        if seq not in self._assign:
            pieces, starts = [], [0, *accumulate(map(length, seq.parts))]
            for run in picks.runs(seq.parts):
                part, start = seq.parts[run[0]], starts[run[0]]
                if isinstance(part, Space) and not part.k:
                    raise UnsupportedGraph(f"all tokens of {part} were dropped, and none is left to stand for them")
                if len(run) > 1:
                    wide = picks.slots(self.b, seq.parts[run.start : run.stop])
                    pieces.append(picks.end_to_end(self.b, wide, starts[run.start : run.stop]))
                elif isinstance(part, Space):
                    pieces.append(self.shifted(self.slots(part), start))
                else:
                    pieces.append(self.arange(start, start + part, samples(seq)))
            self._assign[seq] = self.b.cat(pieces, 1)
        return self._assign[seq]

    def members(self, seq: Seq) -> Node:
        """(B, old) for each original token how many the one that stands for it stands for."""
        slots = self.assign(seq)
        same = self.b.emit(aten.eq.Tensor, *(self.b.emit(aten.unsqueeze.default, slots, d) for d in (1, 2)))
        return self.b.emit(aten.sum.dim_IntList, same, [2])

    def slots(self, space: Space) -> Node:
        """(B, root n) the slot in `space` of every root token."""
        own = space.assign()
        return own if space.parent is None else self.b.emit(aten.gather.default, own, 1, self.slots(space.parent))

    def sizes(self, seq: Seq) -> Node:
        """(B, new) float32: how many original tokens each one holds; 1 for plain ones."""
        if seq not in self._size:
            pieces = []
            for run in picks.runs(seq.parts):
                sizes = [s.size for i in run if isinstance(s := seq.parts[i], Space) and s.size is not None]
                if sizes:
                    pieces.append(sizes[0] if len(run) == 1 else picks.end_to_end(self.b, picks.together(self.b, sizes)))
                else:
                    count = sum(length(seq.parts[i]) for i in run)
                    if count:
                        pieces.append(self.b.constant(torch.ones(samples(seq), count), "ones"))
            self._size[seq] = self.b.cat(pieces, 1)
        return self._size[seq]

    def arange(self, start: int, stop: int, batch: int) -> Node:
        return self.b.constant(torch.arange(start, stop).expand(batch, -1).contiguous(), "positions")

    def shifted(self, index: Node, by: int) -> Node:
        return self.b.emit(aten.add.Tensor, index, by) if by else index

    def sample(self, space: Space, rows: range) -> Space:
        """What one sample of the batch chose, or some at equal distances, as a space of its own."""
        space, all_rows = self.sampled(space)  # a tile of a prompt is a tile of the batch
        rows = all_rows[rows.start : rows.stop : rows.step]
        if (space, rows) not in self._sample:
            take = lambda value: self.b.emit(aten.slice.Tensor, value, 0, rows.start, rows.stop, rows.step)  # noqa: E731
            cut = slice(rows.start, rows.stop, rows.step)
            self._sample[space, rows] = Space(
                f"{space.name}_{rows.start}",
                space.n,
                space.k,
                self.sample(space.parent, rows) if space.parent else None,  # whose tokens the model may read too
                index=take(space.index),
                assign=once(lambda: take(space.assign())),
                size=take(space.size) if space.size is not None else None,
                proportional=space.proportional,
                ordered=space.ordered,
                renumber=space.renumber,
                sources=(space,),
                derive=lambda chosen: chosen(space)[cut],
                hidden=None if space.hidden is None else space.hidden[cut],
                positions=None if space.positions is None else take(space.positions),
                bands=space.bands,
                groups=self.sample(space.groups, rows) if space.groups else None,
            )
        return self._sample[space, rows]

    def sampled(self, part: Space) -> tuple[Space, range]:
        """The space of a whole batch that a part is some samples of, and which; itself with all samples where it is none."""
        found = (key for key, own in self._sample.items() if own is part)
        return next(found, (part, range(samples(Seq((part,))))))

    def samples_of(self, seq: Seq, rows: range) -> Seq:
        """The token axis of one sample, or of some."""
        return Seq(tuple(self.sample(p, rows) if isinstance(p, Space) else p for p in seq.parts))

    # -- gathers -------------------------------------------------------------------------------------------------------

    def coerce(self, x: Node, have: Label, want: Label, origin: Node | None) -> Node:
        """x, typed `have`, restricted to the tokens of `want` (aligned from the right); broadcast axes stay as they are.

        Raises: UnsupportedGraph where the two cannot describe the same tokens.
        """
        have, want = ((),) * (len(want) - len(have)) + tuple(have), tuple(want)
        jobs = [d for d in range(len(want)) if needs_gather(have[d], want[d], origin)]
        if not jobs:
            return x
        # what else stands beside the tokens, such as other numbers of heads, makes no difference
        read = tuple(axis if d in jobs or has_batch(axis) else () for d, axis in enumerate(want))
        if (x, have, read) not in self._coerced:
            self._coerced[x, have, read] = self.gathered(x, have, want, jobs, origin)
        return self._coerced[x, have, read]

    def gathered(self, x: Node, have: Label, want: Label, jobs: list[int], origin: Node | None) -> Node:
        atoms, groups, spots = atomised(have, want, jobs)
        x = self.reshape(x, [new((a,)) for a in atoms])
        for at, target in spots:
            atom = atoms[at]
            index = self.index(atom if isinstance(atom, Seq) else old((atom,)), target)
            x, atoms = self.pick(x, atoms, at, index, target.new, origin)
            atoms[at] = target
        # where heads are folded into the batch, what is alike for all of them is spread over them
        spread_out, left = [], iter(atoms)
        for axis, count in zip(want, groups):
            mine = [next(left) for _ in range(count)]
            spread_out.append(list(axis) if len(axis) == count and any(isinstance(a, Batch) for a in mine) else mine)
        sizes = [new((a,)) for group in spread_out for a in group]
        if sizes != [new((a,)) for a in atoms]:
            x = self.b.emit(aten.expand.default, x, sizes)
        return self.reshape(x, [prod(new((a,)) for a in group) for group in spread_out])

    def reshape(self, x: Node, sizes: list[int]) -> Node:
        return x if shape(x) == tuple(sizes) else self.b.emit(aten.reshape.default, x, sizes)

    def pick(
        self, x: Node, atoms: list[Atom], at: int, index: Node, count: int, origin: Node | None
    ) -> tuple[Node, list[Atom]]:
        """x[..., index, ...] along atom `at`, per sample; x has one dimension per atom."""
        if x.meta["val"].is_complex():  # which the ONNX exporter gathers only as pairs of numbers
            pairs, left = self.pick(self.b.emit(aten.view_as_real.default, x), [*atoms, 2], at, index, count, origin)
            return self.b.emit(aten.view_as_complex.default, pairs), left[:-1]
        sizes = [new((a,)) for a in atoms]
        batch = shape(index)[0]
        if batch == 1:
            flat = self.b.emit(aten.reshape.default, index, [count])
            return self.b.emit(aten.index_select.default, x, at, flat), atoms
        where = next((i for i, a in enumerate(atoms) if isinstance(a, (Batch, BatchSlot))), None)
        if where is None:
            raise UnsupportedGraph("each sample keeps other tokens, but here the batch is no longer to be seen", origin)
        rest = [i for i in range(len(sizes)) if i not in (where, at)]
        batched = sizes[where] != 1
        front = self.b.emit(aten.permute.default, x, [where, at, *rest])
        flat = self.b.emit(aten.reshape.default, front, [sizes[where] * sizes[at], prod(sizes[i] for i in rest)])
        rows = self.b.emit(aten.reshape.default, self.rows(index, sizes[at]) if batched else index, [batch * count])
        taken = self.b.emit(aten.index_select.default, flat, 0, rows)
        wide = self.b.emit(aten.reshape.default, taken, [batch, count, *(sizes[i] for i in rest)])
        order = [where, at, *rest]
        back = self.b.emit(aten.permute.default, wide, [order.index(i) for i in range(len(order))])
        atoms[where] = Batch(batch)
        return back, atoms

    def rows(self, index: Node, n: int) -> Node:
        """(B, k) positions as rows of a (B*n)-row table."""
        offset = self.b.constant(torch.arange(shape(index)[0])[:, None] * n, "offsets")
        return self.b.emit(aten.add.Tensor, index, offset)

    def recover(self, x: Node, label: Label, origin: Node | None) -> Node:
        """x with every token axis back at its old length: each original token gets the row that stands for it."""
        atoms: list[Atom] = [a for axis in label for a in axis]
        x = self.reshape(x, [new((a,)) for a in atoms])
        for at, atom in enumerate(list(atoms)):
            if isinstance(atom, Seq) and atom.spaces:
                x, atoms = self.pick(x, atoms, at, self.assign(atom), atom.old, origin)
                atoms[at] = atom.old
        return self.reshape(x, [old(axis) for axis in label])


def bands_of(space: Space) -> tuple[int, ...]:
    return next((s.bands for s in space.lineage() if s.positions is not None), ())


class BatchSlot(int):
    """A broadcast batch factor of size 1, remembered as the place where the batch goes."""


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """A thunk that is run at most once."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def samples(seq: Seq) -> int:
    """How many samples choose tokens of their own."""
    return max((shape(s.index)[0] for s in seq.spaces if s.index is not None), default=1)


def length(part: int | Space) -> int:
    return part.k if isinstance(part, Space) else part


def aligned(parts: Iterable[int | Space], want: Seq) -> Sequence[int | Space]:
    """For each part of an axis, the part of `want` that covers the same old tokens."""
    have = Seq(tuple(parts))
    if have.old_sizes != want.old_sizes:
        raise UnsupportedGraph(f"token axes that are cut differently meet: {have} and {want}")
    return want.parts


def needs_gather(have: Axis, want: Axis, origin: Node | None) -> bool:
    if have == want or not has_tokens(want) or old(have) == 1:
        return False
    if old(have) != old(want):
        raise UnsupportedGraph(f"an axis of {old(have)} meets a token axis of {old(want)}", origin)
    return True


def atomised(have: Label, want: Label, jobs: list[int]) -> tuple[list[Atom], list[int], list[tuple[int, Seq]]]:
    """One atom per dimension for a tensor typed `have` that is to become `want`; how many atoms each axis has; and
    which atoms to gather to what."""
    atoms: list[Atom] = []
    groups: list[int] = []
    spots: list[tuple[int, Seq]] = []
    for d, axis in enumerate(want):
        if old(have[d]) == 1:
            mine: list[Atom] = [BatchSlot(1) if isinstance(a, Batch) else 1 for a in axis] if has_batch(axis) else [1]
        elif d in jobs or (has_batch(axis) and old(have[d]) == old(axis)):
            mine = split_like(have[d], axis)
        else:
            mine = list(have[d])
        if d in jobs:
            spots += [(len(atoms) + i, t) for i, (own, t) in enumerate(zip(mine, axis)) if isinstance(t, Seq) and own != t]
        atoms += mine
        groups.append(len(mine))
    return atoms, groups, spots


def split_like(have: Axis, want: Axis) -> list[Atom]:
    """The atoms of `have`, plain factors cut so that they stand one to one against those of `want`."""
    out: list[Atom] = []
    todo = list(have)
    for atom in want:
        size = old((atom,))
        own = todo.pop(0) if todo else 1
        if isinstance(own, int) and not isinstance(atom, int) and own != size:
            if own % size:
                raise UnsupportedGraph(f"an axis {have} cannot be read as {want}")
            todo.insert(0, own // size)
            own = size
        elif isinstance(own, int) and isinstance(atom, int) and own != atom:
            todo.insert(0, own // atom)
            own = atom
        if isinstance(atom, Batch) and isinstance(own, int) and own == atom.size:
            own = atom
        out.append(own)
    return out
