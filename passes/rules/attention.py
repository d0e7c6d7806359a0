"""Attention: masks are gathered on demand, and merged tokens weigh as many keys as they hold (proportional attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokcompile.passes.graph import aten, packet
from tokcompile.passes.renumber import as_numbered
from tokcompile.passes.rules.core import (
    Axis,
    Call,
    Label,
    NeedsFull,
    has_tokens,
    old,
    one_sample,
    plain,
    rule,
    tokens_of,
)  # fmt: skip
from tokcompile.passes.rules.sizes import sizes_along, weighs
from tokcompile.passes.tokens import new


@rule("aten.scaled_dot_product_attention")
def sdpa(call: Call) -> Any:
    q, k, v = (call.label(name) for name in ("query", "key", "value"))
    for one in (q, k, v):
        one_sample(one, [-2])
    batch = call.join([q[:-2], ungrouped(call, k, q)[:-2], ungrouped(call, v, q)[:-2]])
    keys = call.join_axis([k[-2], v[-2]])
    key_batch, value_batch = match_batch(k[:-2], batch), match_batch(v[:-2], batch)
    changed: dict[str, Any] = {
        "query": call.coerce("query", (*match_batch(q[:-2], batch), q[-2], q[-1])),
        "key": call.coerce("key", (*key_batch, keys, k[-1])),
        "value": call.coerce("value", (*value_batch, keys, v[-1])),
    }
    changed["attn_mask"] = mask(call, (*batch, q[-2], keys))
    if changed["attn_mask"] is not None:
        changed["is_causal"] = False
    return call.emit((*batch, q[-2], v[-1]), **changed)


def ungrouped(call: Call, label: Label, query: Label) -> Label:
    """With grouped queries the key heads are fewer: the query's heads stand for both."""
    return (*label[:-3], query[-3], *label[-2:]) if call["enable_gqa"] and len(label) > 2 else label


def match_batch(own: Label, batch: Label) -> Label:
    return tuple(b if old(a) == old(b) else a for a, b in zip(own, batch[len(batch) - len(own) :]))


def mask(call: Call, scores: Label) -> Node | None:
    """The mask of the reduced attention, with log sizes of merged keys added; None where nothing is masked."""
    given = call["attn_mask"]
    out: Node | None = None
    if given is not None:
        have = call.label("attn_mask")
        out = call.coerce_node(given, have, as_numbered(call.gather, scores))
    elif call["is_causal"] and not sorted_tokens(scores):
        n, m = old(scores[-2]), old(scores[-1])
        causal = call.rewriter.builder.constant(torch.ones(n, m, dtype=torch.bool).tril(), "causal")
        out = call.coerce_node(causal, plain((n, m)), scores)
    bias = log_sizes(call, scores)
    if bias is None:
        return out
    dtype = call["query"].meta["val"].dtype
    bias = call.op(aten.to.dtype, bias, dtype)
    if out is None and call["is_causal"]:
        n, m = (len_new(a) for a in scores[-2:])
        out = call.rewriter.builder.constant(torch.ones(n, m, dtype=torch.bool).tril(), "causal")
    if out is None:
        return bias
    if out.meta["val"].dtype is torch.bool:
        return call.op(aten.where.ScalarOther, out, bias, float("-inf"))
    return call.op(aten.add.Tensor, out, bias)


def len_new(axis: Axis) -> int:
    return new(axis)


def sorted_tokens(scores: Label) -> bool:
    """Whether a causal mask by position is still right: queries and keys are the same tokens in their original order."""
    if not has_tokens(scores[-2]) and not has_tokens(scores[-1]):
        return True
    seq = tokens_of(scores[-1])
    return scores[-2] == scores[-1] and seq is not None and all(s.in_order for s in seq.spaces)


def log_sizes(call: Call, scores: Label, dim: int = -1) -> Node | None:
    """log(size) of each key along axis `dim` of scores, which it can be added to; None where all sizes are 1."""
    if not weighs(scores[dim]):
        return None
    return sizes_along(call, scores, dim, log=call.node.meta["val"].dtype)


@rule(
    "aten.softmax",
    "aten._softmax",
    "aten._safe_softmax",
    "aten.special_softmax",
    "aten.log_softmax",
    "aten._log_softmax",
)
def softmax(call: Call) -> Any:
    label = call.label("self")
    dim = call["dim"] % len(label)
    one_sample(label, [dim])
    if "log" in packet(call.node) and has_tokens(label[dim]) and call.rewriter.behind_blocks(call.node):
        raise NeedsFull("it gives logarithms of shares of all tokens")
    bias = log_sizes(call, label, dim)
    if bias is None:
        return call.emit(label)
    bias = call.op(aten.to.dtype, bias, call["self"].meta["val"].dtype)
    weights, _ = call.emit(label, self=call.op(aten.add.Tensor, call["self"], bias))
    if "log" not in packet(call.node):
        return call.typed(weights, label)
    return call.typed(call.op(aten.sub.Tensor, weights, bias), label)  # nothing adds up logarithms: they are of one member
