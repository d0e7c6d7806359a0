"""Queries, keys and values of an attention, laid out as (B, H, L, d) whatever the model's own layout is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.attentions import Attention
from tokcompile.passes.graph import RESHAPES, aten, bind, is_tensor, numel, packet, shape
from tokcompile.passes.origin import LAYOUT, moved
from tokcompile.passes.samples import heads_first, samples_first
from tokcompile.passes.tokens import Batch, Label, Seq, has_batch, has_tokens, is_labelled, plain, tokens_of

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter
    from tokcompile.passes.splice import Splice

PROJECTIONS = {
    "aten.linear", "aten.addmm", "aten.matmul", "aten.layer_norm", "aten.rms_norm", "aten.conv2d", "aten.conv3d", "aten.einsum",
}  # fmt: skip
SPLITS = {"aten.split", "aten.split_with_sizes"}
# what takes the channels of a pair apart, and casts
PARTS = SPLITS | {"aten.slice", "aten.select", "aten.unbind", "aten.chunk", "aten.to", "aten._to_copy", "getitem"}
WITHOUT_ATTENTION = "choose a method that does not read attention, such as 'random', 'grid' or 'divprune'"
REPEATS = {"aten.reshape", "aten.view", "aten.expand", "aten.unsqueeze", "aten.clone", "aten.contiguous"}


@dataclass(frozen=True)
class Operand:
    """A query, key or value, as an attention takes it or as it was before positions were rotated into it.

    turned: whether it is (d, L) by itself. segments: whether it may hold a part of the tokens.
    """

    attention: Attention
    name: str
    node: Node
    turned: bool = False
    segments: bool = False

    def token_axis(self, sizes: tuple[int, ...], label: Label, count: int) -> int:
        """The axis that holds its tokens: where the attention has it, unless another one is as long as there are tokens
        (`count`) and that one is not."""
        usual = len(sizes) - (1 if self.turned else 2)
        if self.attention.fused and self.node in (self.attention.q, self.attention.k, self.attention.v):
            return usual
        count = sizes[usual] if self.segments else count
        fitting = [d for d, size in enumerate(sizes) if size == count and (not is_labelled(label) or has_tokens(label[d]))]
        return usual if usual in fitting or not fitting else fitting[-1]


def attentions_of(s: Splice) -> list[Attention]:
    """The attentions a method reads: those of the block before its place, or of the block it stands in."""
    if s.tap_block is None:
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads the attention before its place, but no block over these tokens comes before",
            s.at,
            "place it later: where=[1] or higher",
        )
    return s.tap_block.attentions


def heads(rw: Rewriter, s: Splice, name: str, rotated: bool = False) -> Node:
    """q, k or v as (B, H, L, d), by default before any rotary embedding; attentions side by side count as more heads."""
    parts, attentions = [], attentions_of(s)
    nodes = [of_tokens(getattr(attention, name), shape(s.at)[s.block.token_axis]) for attention in attentions]
    if (whole := in_one_sequence(nodes)) is not None:  # positions were rotated into all of it
        nodes = [whole]
    for attention, node in zip(attentions, nodes):
        times, turned = 1, name == "k" and keys_last(attention)
        if name != "v" and not rotated:
            inner = unrepeated(turned_back(node) if turned else node)
            source = before_rotary(inner)
            if source is not inner:
                node, times, turned = source, real_numbers(node) // real_numbers(inner), False
        operand = Operand(attention, name, node, turned, segments=whole is None and len(attentions) > 1)
        parts.append(repeated(rw, head_by_head(rw, s, operand, in_line=True), times))
    return side_by_side(rw, s, parts)


def of_tokens(node: Node, count: int) -> Node:
    """Keys or values without learned ones, or zeros, that are joined to those of the tokens."""
    turned = packet(node) in ("aten.transpose", "aten.mT", "aten.permute")
    found = node.args[0] if turned else node
    while (axis := joined_along(found)) is not None:
        pieces = found.args[0] if packet(found) == "aten.cat" else [found.args[0]]
        whole = [p for p in pieces if shape(p)[axis] == count]
        if whole:  # turned back, the axes of a square one could not be told apart
            return whole[0] if len(whole) == 1 and not (turned and shape(whole[0]).count(count) > 1) else node
        found = max(pieces, key=lambda p: shape(p)[axis])
    return node


def joined_along(node: Node) -> int | None:
    """The one axis along which something was joined."""
    rank = len(shape(node))
    if packet(node) == "aten.cat":
        return int(bind(node)["dim"]) % rank
    if packet(node) not in ("aten.pad", "aten.constant_pad_nd"):
        return None
    axes = {rank - 1 - i // 2 for i, amount in enumerate(bind(node)["pad"]) if amount}
    return axes.pop() if len(axes) == 1 else None


def in_one_sequence(nodes: list[Node]) -> Node | None:
    """What the operands of several attentions are the pieces of, all of them in their order; None for other operands."""
    splits = {n.args[0] for n in nodes if n.target is operator.getitem}
    split = next(iter(splits)) if len(splits) == 1 else None
    if not isinstance(split, Node) or packet(split) not in SPLITS or len(split.meta["val"]) != len(nodes) > 1:
        return None
    return split.args[0] if [n.args[1] for n in nodes] == list(range(len(nodes))) else None


def unrepeated(node: Node) -> Node:
    """A key from before it was repeated for every query of its group; the node itself where it never was."""
    source = node
    while packet(source) in REPEATS and isinstance(source.args[0], Node):
        source = source.args[0]
    return source if real_numbers(source) < real_numbers(node) else node


def repeated(rw: Rewriter, value: Node, times: int) -> Node:
    """(B, H, L, d) as (B, H * times, L, d), each head so many times in a row."""
    if times == 1:
        return value
    batch, count, length, width = shape(value)
    each = rw.builder.emit(aten.unsqueeze.default, value, 2)
    each = rw.builder.emit(aten.expand.default, each, [batch, count, times, length, width])
    return rw.gather.reshape(each, [batch, count * times, length, width])


def side_by_side(rw: Rewriter, s: Splice, parts: list[Node]) -> Node:
    """Several attentions of one block: over the same tokens they are more heads, over segments in order more tokens."""
    if len(parts) == 1:
        return parts[0]
    dim = 1 if all(shape(p)[2] == token_length(rw, s) for p in parts) else 2
    if dim == 2 and sum(shape(p)[2] for p in parts) != token_length(rw, s):
        raise UnsupportedGraph(
            f"the {len(parts)} attentions of block {s.block.index} do not make up its tokens", s.at, WITHOUT_ATTENTION
        )
    return rw.builder.emit(aten.cat.default, parts, dim)


def head_by_head(rw: Rewriter, s: Splice, operand: Operand, in_line: bool = False) -> Node:
    """Lays a head tensor out as (B, H, L, d), whatever order and grouping of axes the model uses. in_line: whether it may be of
    an attention over all samples at once, which are the windows of an image."""
    node = operand.node
    value, label = rw.env[node], rw.labels.get(node) or plain(shape(node))
    sizes, left, full = shape(value), token_length(rw, s), shape(s.at)[s.block.token_axis]
    count = left if is_labelled(label) else full
    token = operand.token_axis(sizes, label, count)
    count = sizes[token] if operand.segments else count
    in_line &= is_labelled(label) and sizes[token] == windows_in(label, token, s.batch) * count > count
    if sizes[token] != count and not in_line:
        raise UnsupportedGraph(
            f"the {operand.name} of this attention is {'x'.join(map(str, sizes))}: it does not hold the {count} tokens of the "
            "residual stream (windows, or attention over channels)",
            node,
            WITHOUT_ATTENTION,
        )
    axes = range(len(sizes))
    channel = next(d for d in reversed(axes) if d != token)
    lead = [d for d in axes if d not in (token, channel)]
    if in_line:
        lead.sort(key=lambda d: not has_batch(label[d]))
    if [*lead, token, channel] != list(axes):
        value = rw.builder.emit(aten.permute.default, value, [*lead, token, channel])
    tail = [count, sizes[channel]]
    if in_line:
        return windows_first(rw, value, s.batch // (sizes[token] // count), tail)
    heads_before = s.batch > 1 and heads_first(rw.old, s, node, label, lead)
    value = samples_first(rw, value, s.batch, tail, heads_before)
    return restricted(rw, s, value, 2) if count == full != left else value


def windows_in(label: Label, token: int, batch: int) -> int:
    """How many of the `batch` windows stand side by side on the token axis; 0 where that cannot be told."""
    if label[token][:1] == (Batch(batch),):
        return batch
    samples = [axis[0].size for axis in label if len(axis) == 1 and isinstance(axis[0], Batch)]
    return batch // samples[0] if samples and tokens_of(label[token]) else 0


def windows_first(rw: Rewriter, value: Node, batch: int, tail: list[int]) -> Node:
    """A head tensor (B, H, W * L, d) over the windows of a sample as (B * W, H, L, d)."""
    windows = shape(value)[-2] // tail[0]
    count = numel(value) // (batch * windows * tail[0] * tail[1])
    value = rw.gather.reshape(value, [batch, count, windows, *tail])
    value = rw.builder.emit(aten.permute.default, value, [0, 2, 1, 3, 4])
    return rw.gather.reshape(value, [batch * windows, count, *tail])


def restricted(rw: Rewriter, s: Splice, value: Node, dim: int) -> Node:
    """A tensor over the full sequence (an attention that tokens were given back for) at the tokens that are left."""
    seq = next(a for a in (rw.before[s.at][1] or ())[s.block.token_axis] if isinstance(a, Seq))
    have = plain(shape(value))
    want = [*have[:dim], (seq,), *have[dim + 1 :]]
    if s.batch > 1:
        want[0] = (Batch(s.batch),)
    return rw.gather.coerce(value, have, tuple(want), s.at)


def token_length(rw: Rewriter, s: Splice) -> int:
    return shape(rw.before[s.at][0])[s.block.token_axis]


def turned_back(node: Node) -> Node:
    """What the last two axes of were exchanged; the node itself where they were not."""
    rank = len(shape(node))
    return node.args[0] if packet(node) in LAYOUT and moved(node, rank - 1) == rank - 2 else node


def keys_last(attention: Attention) -> bool:
    """Whether the score product takes keys as (d, L): so for matmul, never for einsum."""
    return not attention.fused and any(packet(u) in ("aten.matmul", "aten.bmm", "aten.baddbmm") for u in attention.k.users)


def before_rotary(node: Node) -> Node:
    """Walks a query or key back to what it was before position was rotated into it; the node itself if it never was."""
    size = real_numbers(node)
    found, todo, seen = node, [node], {node}
    while todo:
        n = todo.pop()
        if packet(n) in PROJECTIONS:
            continue
        if packet(n) == "aten.mul" and rotates(n):
            source = next(a for a in n.args[:2] if isinstance(a, Node) and not is_table(a))
            while packet(source) in PARTS and real_numbers(source) != size:
                source = source.args[0]
            source = channels_of(source)
            if source is not None and real_numbers(source) == size:
                found = source
        for inner in n.all_input_nodes:
            if inner not in seen and inner.op == "call_function" and real_numbers(inner) <= size and not is_table(inner):
                seen.add(inner)
                todo.append(inner)
    return found


def channels_of(node: Node) -> Node | None:
    """Of complex numbers, and of pairs, the channels that were laid out so; None where these were laid out otherwise on the
    way."""
    pairs = node.args[0] if packet(node) == "aten.view_as_complex" else node
    given = pairs.args[0] if packet(pairs) in RESHAPES else pairs
    return given if shape(given)[:-1] == shape(pairs)[:-2] else node if pairs is node else None


def rotates(node: Node) -> bool:
    tables = [a for a in node.args[:2] if isinstance(a, Node) and is_table(a)]
    return len(tables) == 1 and len(shape(tables[0])) >= 2 and max(shape(tables[0])[-3:-1]) > 1


def is_table(node: Node) -> bool:
    """A cosine or sine table: it does not come from the tokens, but from constants or from positions that are inputs."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if packet(n) in PROJECTIONS and not outer_product(n):
            return False
        if packet(n) == "aten.embedding" or (n.op == "placeholder" and n.meta["val"].is_floating_point()):
            return False
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return True


def outer_product(node: Node) -> bool:
    """Frequencies times positions, with nothing to sum over, are written as a matrix product."""
    return packet(node) == "aten.matmul" and shape(node.args[0])[-1] == 1


def real_numbers(node: Node) -> int:
    """How many real numbers a tensor holds: two for each complex one; none where a node is no tensor."""
    return numel(node) * (1 + node.meta["val"].is_complex()) if is_tensor(node) else 0
