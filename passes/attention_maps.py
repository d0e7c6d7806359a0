"""Taps of attention maps: softmax rows and scores, read where the model computes them, else computed beside the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.attentions import SDPA, Attention
from tokcompile.passes.find import Block
from tokcompile.passes.graph import aten, bind, packet, shape
from tokcompile.passes.heads import WITHOUT_ATTENTION, Operand, attentions_of, head_by_head, side_by_side, token_length
from tokcompile.passes.last_token import check_last_token
from tokcompile.passes.samples import heads_first, samples_first
from tokcompile.passes.splice import Splice, body, text_ranges
from tokcompile.passes.tokens import make_seq, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter

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
    segments = len(attentions_of(s)) > 1
    query, key = (head_by_head(rw, s, Operand(attention, n, getattr(attention, n), segments=segments)) for n in "qk")
    query = some_rows(rw, query, 2, which)
    if shape(key)[1] != shape(query)[1]:
        key = emit(aten.repeat_interleave.self_int, key, shape(query)[1] // shape(key)[1], 1)
    scale = attention.scale if attention.scale is not None else shape(query)[-1] ** -0.5
    scores = emit(aten.matmul.default, emit(aten.mul.Scalar, query, scale), emit(aten.transpose.int, key, -1, -2))
    return masked(rw, attention, scores, which, s.batch > 1 and query_heads_first(rw, s, attention))


def some_rows(rw: Rewriter, value: Node, dim: int, which: Which) -> Node:
    """Some of the queries along `dim`, which stays."""
    if which is None:
        return value
    if isinstance(which, int):
        at = which % shape(value)[dim]
        return rw.builder.emit(aten.slice.Tensor, value, dim, at, at + 1)
    return rw.builder.cat([rw.builder.emit(aten.slice.Tensor, value, dim, *span) for span in which], dim)


def own_map(rw: Rewriter, s: Splice, attention: Attention, value: Node) -> Node:
    """The softmax the model itself computes, or what goes into it, as (B, H, L, L)."""
    if bind(attention.node)["dim"] % len(shape(value)) == len(shape(value)) - 2:  # a map of keys by queries
        value = rw.builder.emit(aten.transpose.int, value, -1, -2)
    sizes, length = shape(value), token_length(rw, s)
    if sizes[-2] == length < sizes[-1] and sinks_follow(attention):
        value = rw.builder.emit(aten.slice.Tensor, value, -1, 0, length)
        sizes = shape(value)
    if sizes[-2:] != (length, length) and len(attentions_of(s)) == 1:
        raise UnsupportedGraph("the attention is not over the tokens of the residual stream", attention.node, WITHOUT_ATTENTION)
    turned = s.batch > 1 and query_heads_first(rw, s, attention)
    return samples_first(rw, value, s.batch, sizes[-2:], turned)


def query_heads_first(rw: Rewriter, s: Splice, attention: Attention) -> bool:
    """Whether this attention's maps are those of all samples for each head; see `heads_first`."""
    query = attention.q
    return heads_first(rw.old, s, query, rw.labels.get(query) or plain(shape(query)), list(range(len(shape(query)) - 2)))


def sinks_follow(attention: Attention) -> bool:
    """Whether sinks, to which attention goes beside the tokens, are joined to the scores behind them."""
    node = attention.node.args[0]
    while isinstance(node, Node) and packet(node) in ("aten.sub", "aten.to", "aten._to_copy"):
        node = node.args[0]
    return isinstance(node, Node) and packet(node) == "aten.cat" and len(set(shape(node.args[0][0])[-2:])) == 1


def masked(rw: Rewriter, attention: Attention, scores: Node, which: Which, turned: bool) -> Node:
    """Scores with the mask that the rewritten attention itself uses (it holds log sizes too). turned: whether heads come before
    samples there."""
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
        each = [h, b] if turned else [b, h]
        mask = emit(aten.reshape.default, mask, [*each, *shape(mask)[1:]] if shape(mask)[0] == b * h else [1, *shape(mask)])
    if turned and len(shape(mask)) == 4:
        mask = emit(aten.transpose.int, mask, 0, 1)
    if len(shape(mask)) > 1 and shape(mask)[-2] > 1:
        mask = some_rows(rw, mask, -2, which)
    if mask.meta["val"].dtype is torch.bool:
        return emit(aten.where.ScalarOther, mask, scores, float("-inf"))
    return emit(aten.add.Tensor, scores, mask)


def cls_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): how the class token attends, which is the first or the only one behind the patches; under a causal mask the
    last token; without either, attention received."""
    stage = s.block.stage
    if any(a.causal for a in attentions_of(s)) or (stage.prefix < 1 and stage.suffix == 1):
        return last_attention(rw, s)
    if stage.prefix < 1:
        return received_attention(rw, s)
    return side_by_side(rw, s, [rw.builder.emit(aten.select.int, rows(rw, s, a, 0), 2, 0) for a in attentions_of(s)])


def received_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): attention received, the mean over all queries (the one score that costs an N x N map)."""
    return side_by_side(rw, s, [rw.builder.emit(aten.mean.dim, rows(rw, s, a, None), [2]) for a in attentions_of(s)])


def last_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): how the last token attends, which sees everything under a causal mask. Raises: UnsupportedGraph where it is
    padding."""
    attentions = attentions_of(s)
    for attention in attentions:
        check_last_token(rw, s, attention)
    return side_by_side(rw, s, [rw.builder.emit(aten.select.int, rows(rw, s, a, -1), 2, 0) for a in attentions])


def text_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, T, L): how the T text tokens after the reducible ones attend; without text one row, the mean over all queries."""
    start = make_seq(body(s, rw.before[s.at][1])[1]).new
    after = tuple(span for span in text_ranges(rw, s) if span[0] >= start)
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
    return rw.builder.cat(parts, 1)


def earlier_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): attention received in the block that the recipe names, over the same tokens."""
    return received_attention(rw, replace(s, tap_block=earlier_blocks(rw, s)[0]))


def earlier_cls_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, E, L): how the class token attends, mean over heads in float32, in each block from the one that the recipe names to
    the one computed last. As in `cls_attention`, only its row is computed of each."""
    maps = [cls_attention(rw, replace(s, tap_block=block)) for block in earlier_blocks(rw, s)]
    return rw.builder.cat([rw.builder.emit(aten.mean.dim, one, [1], True, dtype=torch.float32) for one in maps], 1)


def earlier_blocks(rw: Rewriter, s: Splice) -> list[Block]:
    """The blocks from the one that the recipe names to that whose attention was computed last. Raises: UnsupportedGraph where
    the first of them had other tokens."""
    blocks = [b for b in rw.structure.blocks if b.stage is s.block.stage]
    assert s.recipe.earlier is not None
    last = blocks.index(s.tap_block) if s.tap_block in blocks else 0
    chosen = blocks[min(s.recipe.earlier(len(blocks), s.site.options), last) : last + 1]
    if rw.labels.get(chosen[0].mid) != rw.labels.get(s.tap_block.mid if s.tap_block else s.at):
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads the attention of block {chosen[0].index}, which had more tokens than come in here",
            s.at,
            "reduce once: where=[...] with one block",
        )
    return chosen
