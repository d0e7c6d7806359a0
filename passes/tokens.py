"""Token spaces as types: what the axes of a tensor mean once tokens have been removed.

An axis is an ordered PRODUCT of atoms (`int`, `Batch`, `Seq`); a `Seq` is an ordered CONCATENATION of parts (plain token
counts and reduced `Space`s). Sizes before the reduction are "old", sizes after it "new". A tensor without a label has its
original value; a labelled one has the original value restricted to the kept tokens, or combined over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node


@dataclass(eq=False)
class Space:
    """What one reduction left of a token axis: `n` tokens before it, `k` after it.

    index:  (B, k) the token of the parent space that each new token stands for (its representative).
    assign: (B, n) the new token that each token of the parent space went to; a thunk, since few graphs need it.
    size:   (B, k) how many original tokens each one holds, or None where nothing was merged.
    ordered: whether `index` ascends, so that causal masks and the like stay what they were.
    sources: the spaces (and numbers of plain tokens) whose tokens these are, where another reduction's are only laid out
            anew: a sample of a batch, or an order of its own. derive(chosen): (B, k) the same from what the sources chose.
            most: of each source, at most so many; all of them where it is empty.
    hidden: (B, root n) tokens that the model cuts off later; of the others it has as many as k allows. None for none.
    positions: (B, k, P) tokens of the parent space that lend each new one P positions in rotary tables, in place of
            `index`; bands: how many frequencies each axis of such a table has, () for one axis.
    groups: what was reduced, where these are its tokens one by one: groups of neighbours kept or dropped together.
    renumber: whether all tokens of the stream are numbered anew after this reduction, in the order they then have.
    drops: whether its method lets tokens go, so that sizes of earlier merging do not add up to all any more.
    start: where its tokens begin in the original sequence; None where that is counted otherwise.
    gone: where all of them were dropped, those tokens of the stream as they were then.
    """

    name: str
    n: int
    k: int
    parent: Space | None = None
    index: Node | None = None
    assign: Any = None
    size: Node | None = None
    proportional: bool = False
    ordered: bool = True
    sources: tuple[int | Space, ...] = ()
    derive: Any = None
    most: tuple[int, ...] = ()
    hidden: Tensor | None = None
    positions: Node | None = None
    bands: tuple[int, ...] = ()
    groups: Space | None = None
    renumber: bool = False
    drops: bool = False
    start: int | None = None
    gone: Node | None = None

    @property
    def short(self) -> bool:
        """Whether tokens are gone, and no other holds them."""
        above = [s for s in (self.parent, self.groups, *self.sources) if isinstance(s, Space)]
        return self.drops or (self.size is None and self.k < self.n) or any(s.short for s in above)

    @property
    def root_n(self) -> int:
        return self.parent.root_n if self.parent else self.n

    @property
    def unit(self) -> int:
        """How many neighbours are kept or dropped together."""
        return self.root_n // self.groups.root_n if self.groups else 1

    def lineage(self) -> list[Space]:
        """This space and its ancestors, youngest first."""
        return [self, *(self.parent.lineage() if self.parent else [])]

    def anchor(self) -> Space | None:
        """The last reduction, this one or an ancestor, after which the tokens were numbered anew."""
        return next((s for s in self.lineage() if s.renumber), None)

    @property
    def in_order(self) -> bool:
        """Whether the positions of its tokens ascend."""
        return all(s.ordered for s in takewhile(lambda s: not s.renumber, self.lineage()))

    def __repr__(self) -> str:
        return f"{self.name}:{self.root_n}->{self.k}"


@dataclass(frozen=True)
class Batch:
    """The batch: each sample keeps its own tokens, so a gather needs to know where the batch runs."""

    size: int

    def __repr__(self) -> str:
        return f"B{self.size}"


@dataclass(frozen=True)
class Seq:
    """A token axis: plain tokens (class token, registers, text) around reduced spaces, in order."""

    parts: tuple[int | Space, ...]

    @property
    def old_sizes(self) -> list[int]:
        """How many original tokens each part covers."""
        return [p if isinstance(p, int) else p.root_n for p in self.parts]

    @property
    def old(self) -> int:
        return sum(self.old_sizes)

    @property
    def new(self) -> int:
        return sum(p if isinstance(p, int) else p.k for p in self.parts)

    @property
    def spaces(self) -> tuple[Space, ...]:
        return tuple(p for p in self.parts if isinstance(p, Space))

    def in_groups(self, unit: int) -> Seq | None:
        """The same as groups of `unit` tokens, where they were reduced in such groups and nothing stands between them."""
        groups = tuple(s.groups for s in self.spaces if s.groups is not None and s.unit == unit)
        return Seq(groups) if groups and len(groups) == len(self.parts) else None

    def __repr__(self) -> str:
        return "Seq(" + " + ".join(map(str, self.parts)) + ")"


class Run(NamedTuple):
    """A row of an output as it was: n tokens, of which some are kept, between plain ones, which all are."""

    before: int
    n: int
    after: int


Atom = int | Batch | Seq
Axis = tuple[Atom, ...]
Label = tuple[Axis, ...]


class SplitsTokens(Exception):
    """A view tears a reduced token axis apart (a grid, windows, or groups of `unit` neighbours)."""

    def __init__(self, seq: Seq, unit: int | None):
        super().__init__(f"a view splits {seq}")
        self.seq, self.unit = seq, unit


def extent(part: int | Space) -> tuple[int, int]:
    """(old, new) length of a part."""
    return (part.root_n, part.k) if isinstance(part, Space) else (part, part)


def make_seq(parts: Iterable[int | Space]) -> Seq:
    """A Seq with neighbouring plain counts added up and empty ones left out."""
    out: list[int | Space] = []
    for part in parts:
        if isinstance(part, int) and out and isinstance(out[-1], int):
            out[-1] += part
        elif part != 0:
            out.append(part)
    return Seq(tuple(out))


def old(axis: Axis) -> int:
    return prod(a.old if isinstance(a, Seq) else a.size if isinstance(a, Batch) else a for a in axis)


def new(axis: Axis) -> int:
    return prod(a.new if isinstance(a, Seq) else a.size if isinstance(a, Batch) else a for a in axis)


def has_tokens(axis: Axis) -> bool:
    return any(isinstance(a, Seq) for a in axis)


def has_batch(axis: Axis) -> bool:
    return any(isinstance(a, Batch) for a in axis)


def spaces_on(axis: Axis) -> list[Space]:
    """What reductions left of the tokens of an axis."""
    return [space for atom in axis if isinstance(atom, Seq) for space in atom.spaces]


def seq_on(axis: Axis) -> Seq | None:
    """The tokens of an axis, whatever they are folded with."""
    return next((a for a in axis if isinstance(a, Seq)), None)


def tokens_of(axis: Axis) -> Seq | None:
    """The Seq of an axis that is nothing but tokens."""
    return axis[0] if len(axis) == 1 and isinstance(axis[0], Seq) else None


def normal(atoms: Iterable[Atom]) -> Axis:
    """An axis in normal form: no 1, and neighbouring plain factors multiplied out."""
    out: list[Atom] = []
    for atom in atoms:
        if isinstance(atom, Seq) and not atom.spaces:
            atom = atom.old
        if isinstance(atom, int) and out and isinstance(out[-1], int):
            out[-1] *= atom
        elif atom != 1:
            out.append(atom)
    return tuple(out)


def plain(shape: Iterable[int]) -> Label:
    return tuple(normal((int(s),)) for s in shape)


def is_labelled(label: Label | None) -> bool:
    return label is not None and any(has_tokens(a) for a in label)


def old_shape(label: Label) -> tuple[int, ...]:
    return tuple(old(a) for a in label)


def new_shape(label: Label) -> tuple[int, ...]:
    return tuple(new(a) for a in label)


def regroup(label: Label, shape: Iterable[int]) -> Label:
    """The label of a view: the same atoms in order, cut anew so that each axis has the given OLD size.

    Plain factors may be split and joined; a token axis may be joined with its neighbours but never split.
    """
    atoms: list[Atom] = list(normal(a for axis in label for a in axis))
    out: list[Axis] = []
    sizes = tuple(shape)
    for want in sizes:
        got: list[Atom] = []
        while want != 1:
            if not atoms:
                raise ValueError(f"it views {describe(label)} as {'x'.join(map(str, sizes))}")
            atom = atoms.pop(0)
            size = old((atom,))
            if size == 0:  # a tensor without entries: where its empty axis goes makes no difference
                got.append(want)
                atoms[:0] = [atom] * (want > 0)
                want = 1
            elif want % size == 0:
                got.append(atom)
                want //= size
            elif isinstance(atom, int) and atom % want == 0:
                got.append(want)
                atoms.insert(0, atom // want)
                want = 1
            elif isinstance(atom, Seq) and atom.old % want == 0 and (groups := atom.in_groups(atom.old // want)) is not None:
                atoms[:0] = [groups, atom.old // want]
            elif isinstance(atom, Seq):
                # a view (N, D) -> (N/u, u*D) glues u neighbours together; anything else (a grid, windows) tears them apart
                raise SplitsTokens(atom, atom.old // want if not got and atom.old % want == 0 else None)
            else:
                raise ValueError(f"it views {describe(label)} as {'x'.join(map(str, sizes))}")
        out.append(normal(got))
    return tuple(out)


def describe(label: Label | None) -> str:
    """A label as text for messages: `[B2, Seq(1 + s:196->98), 384]`."""
    if label is None:
        return "unlabelled"
    return "[" + ", ".join("*".join(map(str, axis)) or "1" for axis in label) + "]"
