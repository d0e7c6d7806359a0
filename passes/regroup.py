"""Regroup: where a model rearranges its patch grid into groups behind the tower (pixel shuffle, patch merging, pooling), the
tower runs in the order of these groups, and the rearrangement becomes a view.

What the movement does is read off by running it on numbers: every entry of the result says which token and which channel it
came from. Where each row of the result is one group of whole tokens, the tokens are put into group order once, before the
first block, tables and masks follow, and the movement is replaced by a view of neighbours (and a mean, for pooling).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.calls import MARK
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.flatten import TOKENWISE
from tokcompile.passes.fold import fold_constants
from tokcompile.passes.gather import once
from tokcompile.passes.graph import RESHAPES, aten, buffer, get_attr, is_tensor, packet, propagate_shapes, shape
from tokcompile.passes.memory import reachable_from
from tokcompile.passes.movement import Movement, movements
from tokcompile.passes.rewrite import Rewriter
from tokcompile.passes.stages import Stage
from tokcompile.passes.tokens import Seq, Space, make_seq, plain
from tokcompile.passes.tokens import regroup as cut_anew


@dataclass(frozen=True)
class Form:
    """A rearrangement in normal form: rows of `groups` neighbours in `order`, each the mean of `mean` tokens, joined along
    the channels, which then are put in the order `channels` (None: as they are)."""

    order: Tensor
    groups: int
    mean: int
    channels: Tensor | None

    @property
    def unit(self) -> int:
        return self.groups * self.mean


@dataclass(frozen=True)
class Exit:
    """A node behind a movement of tokens: what it is computed from, and the normal form of the way there."""

    node: Node
    source: Node
    form: Form


@dataclass(frozen=True)
class Grouping:
    """The rearrangements of one stage's tokens, which agree in their order; `inside`: the nodes of the movement."""

    stage: Stage
    exits: tuple[Exit, ...]
    inside: frozenset[Node]

    @property
    def order(self) -> Tensor:
        return self.exits[0].form.order

    @property
    def unit(self) -> int:
        return self.exits[0].form.unit


def find_groupings(gm: GraphModule, structure: Structure) -> list[Grouping]:
    """The stages whose tokens are rearranged into groups after their first block."""
    out = []
    found = movements(gm)
    for stage in structure.stages:
        blocks = [b for b in structure.blocks if b.stage is stage and b.why_not is None]
        if not blocks or stage.text:
            continue
        behind = reachable_from({blocks[0].out})
        exits: list[Exit] = []
        for movement in found:
            if movement.source in behind and is_tensor(movement.source) and length_in(movement.source, blocks[0]):
                last = not reachable_from({movement.source}) & {b.entry for b in blocks}
                exits += exits_of(movement, blocks[0], last)
        exits.sort(key=lambda e: structure.order[e.node])
        exits = [e for e in exits if e.form.unit == exits[0].form.unit and torch.equal(e.form.order, exits[0].form.order)]
        if exits and needed(exits, stage):
            sources = {e.source for e in exits}
            inside = frozenset(n for m in found if m.source in sources for n in m.nodes)
            out.append(Grouping(stage, tuple(exits), inside))
    return out


def needed(exits: list[Exit], stage: Stage) -> bool:
    """Whether a view alone would not do: another order, a mean, or a class token that groups cannot be counted around."""
    form = exits[0].form
    moved = not torch.equal(form.order, torch.arange(len(form.order)))
    return moved or form.mean > 1 or bool(stage.prefix % form.unit or stage.suffix % form.unit)


def length_in(node: Node, block: Block) -> int | None:
    """How many tokens of each sample a tensor holds that is laid out as the stream of that block, with or without those
    around the visual ones; None for other tensors."""
    sizes, batch = shape(node), block.batch
    for length in (block.stage.length, block.stage.n):
        if tokens_first(block):
            fits = sizes[:-1] == (length, batch)
        else:  # of one sample both orders are the same numbers
            fits = sizes[:-1] in ((batch, length), (batch * length,)) or (batch == 1 and sizes[:-1] == (length, 1))
        if fits:
            return length
    return None


def tokens_first(block: Block) -> bool:
    return block.batch_axis == 1 and block.batch > 1


def exits_of(movement: Movement, block: Block, last: bool = False) -> list[Exit]:
    """The ends of a movement whose rows are groups of tokens; channels have to be on the last axis. last: whether no block of
    the tower follows, so that groups that were picked by an index may keep an axis for their members."""
    source, out = movement.source, []
    sizes = shape(source)
    picked = last and any(packet(n) in ("aten.index", "aten.index_select") for n in movement.nodes)
    rows = {n: shape(n)[:-2] if picked and members_apart(n, sizes) else rows_of(n) for n in movement.ends if shape(n)}
    candidates = [n for n, lead in rows.items() if prod(lead) < prod(sizes[:-1]) and shape(n)[-1] % sizes[-1] == 0]
    if not candidates:
        return []
    marks = torch.arange(prod(sizes), dtype=torch.int64 if prod(sizes) >= 1 << 31 else torch.int32)
    batch, length = block.batch, length_in(source, block) or 0
    laid = marks.reshape(batch, length, -1).transpose(0, 1).contiguous() if tokens_first(block) else marks.reshape(sizes)
    prefix = block.stage.prefix if length == block.stage.length else 0
    for node, values in movement.run(laid, candidates).items():
        marks = torch.stack(values, -1).reshape(*rows[node], -1, len(values))
        form = form_of(marks, batch, length, sizes[-1], prefix, block.stage.n)
        if form is not None:
            out.append(Exit(node, source, form))
    return out


def members_apart(node: Node, sizes: tuple[int, ...]) -> bool:
    """Whether it may be (groups, members, D), as where a token is made of its patches by attention."""
    mine = shape(node)
    return len(mine) > 2 and mine[-2] > 1 and mine[-1] == sizes[-1] and prod(mine) == prod(sizes)


def rows_of(node: Node) -> tuple[int, ...]:
    """The axes of a tensor that its groups lie on: all but the last; or but the last two, where these are joined later, behind
    what is done to each token."""
    sizes = shape(node)
    alike = [node]
    for one in alike:
        for user in one.users:
            if packet(user) in RESHAPES and len(sizes) > 2 and shape(user)[-1] == sizes[-2] * sizes[-1]:
                return sizes[:-2]
            if packet(user) in TOKENWISE and shape(user) == sizes and user not in alike:
                alike.append(user)
    return sizes[:-1]


def form_of(marks: Tensor, batch: int, length: int, width: int, prefix: int, n: int) -> Form | None:
    """The normal form of what a movement made of numbered entries; None where its rows are not groups of whole tokens.

    marks: (..., C, j) which entry of (batch, length, width) each entry of the result is, or the mean of which j.
    """
    rows, (channels, mean) = prod(marks.shape[:-2]), marks.shape[-2:]
    if rows % batch or channels % width or rows * channels * mean != batch * n * width:
        return None
    marks = marks.reshape(rows, channels, mean)
    channel, token = marks % width, marks // width
    token = token.reshape(batch, -1, channels, mean) - torch.arange(batch)[:, None, None, None] * length
    if bool((channel != channel[:1, :, :1]).any()) or bool((token != token[:1]).any()):
        return None
    channel, token = channel[0, :, 0].long(), token[0].long() - prefix  # (C,), (rows of a sample, C, j)
    first = token[0, :, 0]  # tokens of the first row, by channel: they number the members of every group
    members = list(dict.fromkeys(first.tolist()))
    member = torch.tensor([members.index(t) for t in first.tolist()])
    leader = torch.tensor([int((member == g).nonzero()[0]) for g in range(len(members))])
    if len(members) * width != channels or bool((token != token[:, leader][:, member]).any()):
        return None
    order = token[:, leader].reshape(-1)
    place = member * width + channel
    whole = torch.equal(order.sort().values, torch.arange(n)) and torch.equal(place.sort().values, torch.arange(channels))
    if not whole or len(members) * mean == 1:
        return None
    return Form(order, len(members), mean, None if torch.equal(place, torch.arange(channels)) else place)


def regroup(gm: GraphModule, structure: Structure, groupings: list[Grouping], inputs: list[object]) -> GraphModule:
    """An equal graph in which the tokens of each grouping run in its order; `gm` is kept."""
    rewriter = InGroupOrder(gm, structure, groupings)
    made = rewriter.run().gm
    made.meta.update(gm.meta)
    write_out_indices(made)
    fold_constants(made)
    propagate_shapes(made, inputs)
    made.recompile()
    return made


def write_out_indices(gm: GraphModule) -> None:
    """Constant indices that were only viewed anew become constants of that shape: rules read the order from them."""
    for i, node in enumerate(list(gm.graph.nodes)):
        index = node.args[2] if packet(node) == "aten.index_select" else None
        if index is None or packet(index) != "aten.reshape" or index.args[0].op != "get_attr":
            continue
        flat = buffer(gm, f"_tokcompile_index_{i}", get_attr(gm, index.args[0].target).reshape(index.args[1]), node)
        flat.meta = dict(index.meta)
        node.replace_input_with(index, flat)
    gm.graph.eliminate_dead_code()


class InGroupOrder(Rewriter):
    """A rewrite in which nothing is dropped: tokens change places before the first block, and the movement behind becomes a
    view. What still wants the old order gets it back."""

    def __init__(self, gm: GraphModule, structure: Structure, groupings: list[Grouping]):
        super().__init__(gm, structure, (), recover="anywhere")
        self.exits = {e.node: (g, e) for g in groupings for e in g.exits}
        first = {id(g): next(b for b in structure.blocks if b.stage is g.stage) for g in groupings}
        self.entries = {first[id(g)].entry: (g, first[id(g)]) for g in groupings}
        self.placed: dict[int, tuple[Seq, Block]] = {}

    def step(self, node: Node) -> None:
        if node in self.exits:
            self.env[node] = self.grouped(*self.exits[node])
            return
        if packet(node) == MARK:  # for the rewrite that comes after this one
            if not any(self.is_labelled(n) for n in node.all_input_nodes):
                self.env[node] = self.builder.copy(node, self.plain_value)
            return
        super().step(node)
        if node in self.entries:
            self.put_in_order(node, *self.entries[node])

    def put_in_order(self, node: Node, grouping: Grouping, block: Block) -> None:
        """The tokens of a stream change places, those around them stay."""
        stage, axis, order = grouping.stage, block.token_axis, grouping.order
        x = self.env[node]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        space = Space("order", len(order), len(order), index=self.builder.constant(order[None], "order"), ordered=False)
        space.assign = once(lambda: self.builder.constant(place[None], "places"))
        label, seq = list(plain(shape(x))), make_seq((stage.prefix, space, stage.suffix))
        label[axis] = (seq,)
        self.placed[id(grouping)] = seq, block
        if torch.equal(order, torch.arange(len(order))):
            return
        edges = torch.arange(stage.prefix), torch.arange(stage.length - stage.suffix, stage.length)
        whole = self.builder.constant(torch.cat([edges[0], order + stage.prefix, edges[1]]), "tokens")
        self.before.setdefault(node, (x, None))
        self.set(node, self.builder.emit(aten.index_select.default, x, axis, whole), tuple(label))

    def grouped(self, grouping: Grouping, exit: Exit) -> Node:
        """What the movement gives, as a view of groups of neighbours."""
        stage, emit, form = grouping.stage, self.builder.emit, exit.form
        x, whole = self.standing(grouping, exit)
        if x.meta["val"].dtype != (dtype := exit.node.meta["val"].dtype):  # of a mean in higher precision
            x = emit(aten.to.dtype, x, dtype)
        if whole and stage.prefix + stage.suffix:
            x = emit(aten.slice.Tensor, x, 1, stage.prefix, stage.length - stage.suffix)
        width = shape(x)[-1]
        lead = list(rows_of(exit.node))
        lead = lead[:-1] if prod(lead) * form.unit > prod(shape(x)[:-1]) else lead
        if form.mean > 1:
            x = emit(aten.reshape.default, x, [*lead, form.groups, form.mean, width])
            x = emit(aten.mean.dim, x, [len(lead) + 1])
        x = emit(aten.reshape.default, x, [*lead, form.groups * width])
        if form.channels is None:
            pass
        elif torch.equal(form.channels, torch.arange(form.groups * width).reshape(form.groups, width).T.reshape(-1)):
            x = emit(aten.reshape.default, x, [*lead, form.groups, width])
            x = emit(aten.reshape.default, emit(aten.transpose.int, x, -1, -2), [*lead, form.groups * width])
        else:
            x = emit(aten.index_select.default, x, -1, self.builder.constant(form.channels, "channels"))
        return self.gather.reshape(x, list(shape(exit.node)))

    def standing(self, grouping: Grouping, exit: Exit) -> tuple[Node, bool]:
        """(B, tokens, D) what the movement starts from, in the order of the groups, and whether all tokens are in it."""
        seq, block = self.placed[id(grouping)]
        x, have = self.env[exit.source], self.labels.get(exit.source) or plain(shape(exit.source))
        length = length_in(exit.source, block) or 0
        if tokens_first(block):
            x, have = self.builder.emit(aten.transpose.int, x, 0, 1), (have[1], have[0], have[2])
        else:
            sizes = (block.batch, length, shape(x)[-1])
            x, have = self.gather.reshape(x, list(sizes)), cut_anew(have, sizes)
        whole = length == grouping.stage.length
        if not torch.equal(grouping.order, torch.arange(len(grouping.order))):
            tokens = seq if whole else Seq(seq.spaces)
            x = self.gather.coerce(x, have, (have[0], (tokens,), have[2]), exit.node)
        return x, whole
