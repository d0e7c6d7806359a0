"""Taps: the tensors a method reads, taken from the graph beside the fused kernels."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.find import SDPA, Attention
from tokcompile.passes.graph import aten, bind, packet, shape
from tokcompile.passes.tokens import Batch, Seq, has_tokens, is_labelled, make_seq, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter, Splice


PROJECTIONS = {
    "aten.linear",
    "aten.addmm",
    "aten.matmul",
    "aten.layer_norm",
    "aten.rms_norm",
    "aten.conv2d",
    "aten.conv3d",
    "aten.einsum",
}


def read_taps(rw: Rewriter, s: Splice) -> list[Node]:
    """One node per tap of the splice, each over the whole sequence: (B, H, L, d), (B, H, L), (B, L) or (B, L, D)."""
    return [READERS[name](rw, s) for name in taps_of(rw, s)]


def taps_of(rw: Rewriter, s: Splice) -> tuple[str, ...]:
    """The taps that this splice can have: none before any attention, nothing of the text where there is none."""
    if s.recipe.opening and s.tap_block is None:
        return ()
    text = bool(rw.text_ranges(s))
    return tuple(name for name in s.recipe.taps_read() if text or name not in ("embeds", "text_embeds"))


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
    parts = []
    for attention in attentions_of(s):
        node: Node = getattr(attention, name)
        if attention.fused and name != "v" and not rotated:
            node = before_rotary(node)
        parts.append(standard(rw, s, node, name, attention))
    return side_by_side(rw, s, parts)


def side_by_side(rw: Rewriter, s: Splice, parts: list[Node]) -> Node:
    """Several attentions of one block: over the same tokens they are more heads, over segments in order more tokens."""
    if len(parts) == 1:
        return parts[0]
    dim = 1 if all(shape(p)[2] == token_length(rw, s) for p in parts) else 2
    if dim == 2 and sum(shape(p)[2] for p in parts) != token_length(rw, s):
        raise UnsupportedGraph(
            f"the {len(parts)} attentions of block {s.block.index} do not make up its tokens",
            s.at,
            "choose a method that does not read attention, such as 'random', 'grid' or 'divprune'",
        )
    return rw.builder.emit(aten.cat.default, parts, dim)


def standard(rw: Rewriter, s: Splice, node: Node, name: str, attention: Attention) -> Node:
    """Lays a head tensor out as (B, H, L, d), whatever order and grouping of axes the model uses."""
    value, label = rw.env[node], rw.labels.get(node) or plain(shape(node))
    length, full = token_length(rw, s), shape(s.at)[s.block.token_axis]
    sizes = shape(value)
    rank = len(sizes)
    usual = rank - 1 if not attention.fused and name == "k" and keys_last(attention) else rank - 2
    wanted = length if is_labelled(label) else full
    if len(s.tap_block.attentions if s.tap_block else ()) > 1:  # perhaps one segment each
        wanted = sizes[usual]
    axes = [d for d in range(rank) if sizes[d] == wanted and (not is_labelled(label) or has_tokens(label[d]))]
    operand = attention.fused and node in (attention.q, attention.k, attention.v)  # whose layout is known
    token = usual if operand or usual in axes else next(iter(reversed(axes)), usual)
    if sizes[token] != wanted:
        raise UnsupportedGraph(
            f"the {name} of this attention is {'x'.join(map(str, sizes))}: it does not hold the {wanted} tokens of the "
            "residual stream (windows, or attention over channels)",
            node,
            "choose a method that does not read attention, such as 'random', 'grid' or 'divprune'",
        )
    channel = next(d for d in (rank - 1, rank - 2, rank - 3) if d != token)
    lead = [d for d in range(rank) if d not in (token, channel)]
    if [*lead, token, channel] != list(range(rank)):
        value = rw.builder.emit(aten.permute.default, value, [*lead, token, channel])
    count = prod(sizes[d] for d in lead)
    value = rw.gather.reshape(value, [s.batch, count // s.batch, wanted, sizes[channel]])
    return restricted(rw, s, value, 2) if wanted == full != length else value


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


def keys_last(attention: Attention) -> bool:
    """Whether the score product takes keys as (d, L): so for matmul, never for einsum."""
    return any(packet(u) in ("aten.matmul", "aten.bmm", "aten.baddbmm") for u in attention.k.users)


def before_rotary(node: Node) -> Node:
    """Walks a query or key back to what it was before position was rotated into it; the node itself if it never was."""
    size = _numel(node)
    found, todo, seen = node, [node], {node}
    while todo:
        n = todo.pop()
        if packet(n) in PROJECTIONS:
            continue
        if packet(n) == "aten.mul" and rotates(n):
            source = next(a for a in n.args[:2] if isinstance(a, Node) and not is_table(a))
            while packet(source) in ("aten.slice", "aten.to", "aten._to_copy"):
                source = source.args[0]
            if _numel(source) == size:
                found = source
        for inner in n.all_input_nodes:
            if inner not in seen and inner.op == "call_function" and _numel(inner) <= size and not is_table(inner):
                seen.add(inner)
                todo.append(inner)
    return found


def rotates(node: Node) -> bool:
    tables = [a for a in node.args[:2] if isinstance(a, Node) and is_table(a)]
    return len(tables) == 1 and len(shape(tables[0])) >= 2 and max(shape(tables[0])[-3:-1]) > 1


def is_table(node: Node) -> bool:
    """A cosine or sine table: it does not come from the tokens."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if packet(n) in PROJECTIONS or n.op == "placeholder":
            return False
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return True


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if hasattr(value, "numel") else 0


Which = int | tuple[tuple[int, int], ...] | None  # queries: one of them, those of these (start, stop), or all


def rows(rw: Rewriter, s: Splice, attention: Attention, which: Which) -> Node:
    """Softmax rows (B, H, m, L) with scale, mask and sizes as the attention has them.

    Where the model computes them itself they are read; beside a fused kernel they are computed again.
    """
    if not attention.fused:
        return some_rows(rw, own_map(rw, s, attention, rw.env[attention.node]), 2, which)
    return rw.builder.emit(aten.softmax.int, scores_of(rw, s, attention, which), -1)


def scores_of(rw: Rewriter, s: Splice, attention: Attention, which: Which) -> Node:
    """The rows (B, H, m, L) before the softmax, scaled and masked."""
    emit = rw.builder.emit
    if not attention.fused:
        return some_rows(rw, own_map(rw, s, attention, rw.env[attention.node].args[0]), 2, which)
    query, key = (standard(rw, s, n, name, attention) for n, name in ((attention.q, "q"), (attention.k, "k")))
    query = some_rows(rw, query, 2, which)
    if shape(key)[1] != shape(query)[1]:
        key = emit(aten.repeat_interleave.self_int, key, shape(query)[1] // shape(key)[1], 1)
    scale = attention.scale if attention.scale is not None else shape(query)[-1] ** -0.5
    scores = emit(aten.matmul.default, emit(aten.mul.Scalar, query, scale), emit(aten.transpose.int, key, -1, -2))
    return masked(rw, attention, scores, which)


def some_rows(rw: Rewriter, value: Node, dim: int, which: Which) -> Node:
    """Some of the queries along `dim`, which stays."""
    if which is None:
        return value
    if isinstance(which, int):
        at = which % shape(value)[dim]
        return rw.builder.emit(aten.slice.Tensor, value, dim, at, at + 1)
    return joined(rw, [rw.builder.emit(aten.slice.Tensor, value, dim, *span) for span in which], dim)


def joined(rw: Rewriter, parts: list[Node], dim: int) -> Node:
    return parts[0] if len(parts) == 1 else rw.builder.emit(aten.cat.default, parts, dim)


def own_map(rw: Rewriter, s: Splice, attention: Attention, value: Node) -> Node:
    """The softmax the model itself computes, or what goes into it, as (B, H, L, L)."""
    sizes, length = shape(value), token_length(rw, s)
    if sizes[-2:] != (length, length) and len(attentions_of(s)) == 1:
        raise UnsupportedGraph(
            "the attention is not over the tokens of the residual stream",
            attention.node,
            "choose a method that does not read attention, such as 'random', 'grid' or 'divprune'",
        )
    return rw.gather.reshape(value, [s.batch, prod(sizes[:-2]) // s.batch, *sizes[-2:]])


def masked(rw: Rewriter, attention: Attention, scores: Node, which: Which) -> Node:
    """Scores with the mask that the rewritten attention itself uses (it holds log sizes too)."""
    fused = rw.env[attention.node]
    bound, emit = (bind(fused) if packet(fused) == SDPA else {}), rw.builder.emit
    mask, length = bound.get("attn_mask"), shape(scores)[-1]
    if bound.get("is_causal") and which != -1:  # the last query sees everything
        visible = emit(aten.ones.default, [length, length], dtype=torch.bool, device=scores.meta["val"].device)
        mask = emit(aten.tril.default, visible)
    if mask is None:
        return scores
    if len(shape(mask)) == 3:  # (B * H or 1, L, L)
        b, h = shape(scores)[:2]
        mask = emit(aten.reshape.default, mask, [b, h, *shape(mask)[1:]] if shape(mask)[0] == b * h else [1, *shape(mask)])
    if len(shape(mask)) > 1 and shape(mask)[-2] > 1:
        mask = some_rows(rw, mask, -2, which)
    if mask.meta["val"].dtype is torch.bool:
        return emit(aten.where.ScalarOther, mask, scores, float("-inf"))
    return emit(aten.add.Tensor, scores, mask)


def cls_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): how the class token attends; under a causal mask the last token; without either, attention received."""
    if any(a.causal for a in attentions_of(s)):
        return last_attention(rw, s)
    if s.block.stage.prefix < 1:
        return received_attention(rw, s)
    return side_by_side(rw, s, [rw.builder.emit(aten.select.int, rows(rw, s, a, 0), 2, 0) for a in attentions_of(s)])


def received_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): attention received, the mean over all queries (the one score that costs an N x N map)."""
    return side_by_side(rw, s, [rw.builder.emit(aten.mean.dim, rows(rw, s, a, None), [2]) for a in attentions_of(s)])


def last_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): how the last token attends, which sees everything under a causal mask."""
    return side_by_side(rw, s, [rw.builder.emit(aten.select.int, rows(rw, s, a, -1), 2, 0) for a in attentions_of(s)])


def text_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, T, L): how the T text tokens after the reducible ones attend; without text one row, the mean over all queries."""
    start = make_seq(rw.body(s, rw.before[s.at][1])[1]).new
    after = tuple(span for span in rw.text_ranges(s) if span[0] >= start)
    if not after:
        return rw.builder.emit(aten.unsqueeze.default, received_attention(rw, s), 2)
    return one_attention(rw, s, [rows(rw, s, a, after) for a in attentions_of(s)])


def scores(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L, L): the whole map before the softmax."""
    return one_attention(rw, s, [scores_of(rw, s, a, None) for a in attentions_of(s)])


def one_attention(rw: Rewriter, s: Splice, parts: list[Node]) -> Node:
    """Maps of several attentions of one block as more heads; each has to be over all tokens."""
    if any(shape(p)[-1] != token_length(rw, s) for p in parts):
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads a map of all tokens, and block {s.block.index} attends within segments",
            s.at,
            "choose a method that reads less, such as 'dart' or 'divprune'",
        )
    return joined(rw, parts, 1)


def earlier_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): attention received in the block that the recipe names, over the same tokens."""
    blocks = [b for b in rw.structure.blocks if b.stage is s.block.stage]
    assert s.recipe.earlier is not None
    last = blocks.index(s.tap_block) if s.tap_block in blocks else 0
    chosen = blocks[min(s.recipe.earlier(len(blocks), s.site.options), last)]
    if rw.labels.get(chosen.mid) != rw.labels.get(s.tap_block.mid if s.tap_block else s.at):
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads the attention of block {chosen.index}, which had more tokens than come in here",
            s.at,
            "reduce once: where=[...] with one block",
        )
    return received_attention(rw, replace(s, tap_block=chosen))


def embeds(rw: Rewriter, s: Splice) -> Node:
    """(B, n0, D): the reducible tokens as they came into the first block, all of the original ones."""
    x, start = first_input(rw, s), s.prefix
    parent = rw.body(s, rw.before[s.at][1])[0]
    return rw.builder.emit(aten.slice.Tensor, x, 1, start, start + (parent.root_n if parent else s.site.n))


def text_embeds(rw: Rewriter, s: Splice) -> Node:
    """(B, T, D): all text tokens as they came into the first block, in their order."""
    return some_rows(rw, first_input(rw, s), 1, rw.text_ranges(s, original=True))


def first_input(rw: Rewriter, s: Splice) -> Node:
    """(B, L, D): what came into the first block over these tokens. Raises: UnsupportedGraph where it was reduced before."""
    first = next(b for b in rw.structure.blocks if b.stage is s.block.stage)
    value, label = rw.before.get(first.entry) or (rw.env[first.entry], rw.labels.get(first.entry))
    if is_labelled(label):
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads the input of block {first.index}, which is reduced already", s.at
        )
    return rw.standard(value, first)


# what a norm over the last axis is written with, where it is not one op
NORM = {"aten.layer_norm", "aten.rms_norm", "aten.to", "aten._to_copy", "aten.pow", "aten.square", "aten.mul", "aten.add",
        "aten.sub", "aten.div", "aten.rsqrt", "aten.sqrt", "aten.mean", "aten.var"}  # fmt: skip


def normed(rw: Rewriter, s: Splice) -> Node:
    """(B, L, D): the residual stream after the model's final norm; as it is where no such norm is found."""
    x = rw.standard(rw.before[s.at][0], s.block)
    last = [b for b in rw.structure.blocks if b.stage is s.block.stage][-1]
    end = last.end or last.mid
    new: dict[Node, Node] = {end: x}
    for node in final_norm(end, rw.structure.order):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: new[n] if n in new else rw.env_or_copy(n))
        new[node] = x = rw.builder.emit(node.target, *args, **kwargs)
    return x


def final_norm(end: Node, order: dict[Node, int]) -> list[Node]:
    """The nodes of the norm that reads the last block's result, in order; its last one has a weight per channel."""
    inside, found = {end}, end
    for node in sorted(followers(end), key=order.__getitem__):
        weights = [n for n in node.all_input_nodes if n not in inside]
        if packet(node) not in NORM or any(n.op != "get_attr" for n in weights) or not keeps_tokens(node, end):
            continue
        inside.add(node)
        if weights and shape(node) == shape(end) and all(shape(n)[-1:] == shape(end)[-1:] for n in weights):
            found = node
    ancestors, todo = set(), [found]
    while todo:
        n = todo.pop()
        if n is not end and n not in ancestors:
            ancestors.add(n)
            todo += [i for i in n.all_input_nodes if i in inside]
    return sorted(ancestors, key=order.__getitem__)


def followers(end: Node) -> set[Node]:
    """All that comes from a node through the ops of a norm."""
    found: set[Node] = set()
    todo = list(end.users)
    while todo:
        n = todo.pop()
        if n not in found and packet(n) in NORM:
            found.add(n)
            todo += n.users
    return found


def keeps_tokens(node: Node, end: Node) -> bool:
    """Whether an op leaves every token its own: same leading sizes, the last one whole or one."""
    size, full = shape(node), shape(end)
    return len(size) == len(full) and size[:-1] == full[:-1] and size[-1] in (1, full[-1])


READERS: dict[str, Any] = {
    "q": lambda rw, s: heads(rw, s, "q"),
    "k": lambda rw, s: heads(rw, s, "k"),
    "v": lambda rw, s: heads(rw, s, "v"),
    "rotated_k": lambda rw, s: heads(rw, s, "k", rotated=True),
    "cls_attention": cls_attention,
    "received_attention": received_attention,
    "last_attention": last_attention,
    "earlier_attention": earlier_attention,
    "text_attention": text_attention,
    "scores": scores,
    "embeds": embeds,
    "text_embeds": text_embeds,
    "normed": normed,
}
