"""Taps: the tensors a method reads, taken from the graph beside the fused kernels."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.find import SDPA, Attention
from tokcompile.passes.graph import aten, bind, packet, shape
from tokcompile.passes.tokens import is_labelled, old, plain

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter, Splice


def read_taps(rw: Rewriter, s: Splice) -> list[Node]:
    """One node per tap of the recipe, each over the whole sequence: (B, H, L, d), (B, H, L), (B, L) or (B, L, D)."""
    return [READERS[name](rw, s) for name in s.recipe.taps_read()]


def attention_of(s: Splice) -> Attention:
    block = s.tap_block
    if block is None:
        raise UnsupportedGraph(
            f"method {s.recipe.name!r} reads the attention before its place, but no block comes before", s.at,
            "place it later: where=[1] or higher",
        )
    if len(block.attentions) > 1:
        raise UnsupportedGraph(f"block {block.index} has {len(block.attentions)} attentions side by side", s.at,
                               "choose a method that does not read attention, such as 'random', 'grid' or 'divprune'")
    return block.attentions[0]


def heads(rw: Rewriter, s: Splice, name: str, rotated: bool = False) -> Node:
    """q, k or v of the attention as (B, H, L, d); before any rotary embedding unless `rotated`."""
    attention = attention_of(s)
    node: Node = getattr(attention, name)
    if not attention.fused:
        node = straight(attention, name, node)
    elif not rotated and name != "v":
        node = before_rotary(node, attention)
    return standard(rw, s, node, name, attention)


def straight(attention: Attention, name: str, node: Node) -> Node:
    return node


def standard(rw: Rewriter, s: Splice, node: Node, name: str, attention: Attention) -> Node:
    """Lays a head tensor out as (B, H, L, d), whatever order and grouping of axes the model uses."""
    value, label = rw.env[node], rw.labels.get(node) or plain(shape(node))
    length = token_length(rw, s)
    sizes = shape(value)
    rank = len(sizes)
    axes = [d for d in range(rank) if sizes[d] == length and (is_labelled((label[d],)) or not is_labelled(label))]
    preferred = rank - 1 if (not attention.fused and name == "k" and transposed(attention)) else rank - 2
    if attention.fused or preferred in axes:
        token = preferred
    else:
        token = next((d for d in reversed(axes)), preferred)
    if sizes[token] != length:
        raise UnsupportedGraph(
            f"the {name} of this attention is {'x'.join(map(str, sizes))}: it does not hold the {length} tokens of the "
            "residual stream (windows, or attention over channels)", node, "choose a method that does not read it",
        )
    channel = next(d for d in (rank - 1, rank - 2, rank - 3) if d != token)
    lead = [d for d in range(rank) if d not in (token, channel)]
    if lead + [token, channel] != list(range(rank)):
        value = rw.builder.emit(aten.permute.default, value, [*lead, token, channel])
    b = rw.gather.batch if s.block.batch_axis is not None else 1
    total = 1
    for d in lead:
        total *= sizes[d]
    want = [b, total // b, length, sizes[channel]]
    return value if list(shape(value)) == want else rw.builder.emit(aten.reshape.default, value, want)


def token_length(rw: Rewriter, s: Splice) -> int:
    return shape(rw.env[s.at])[s.block.token_axis]


def transposed(attention: Attention) -> bool:
    """Whether the score matmul takes keys as (d, L): always so for matmul, never for the fused op."""
    user = next((u for u in attention.k.users if packet(u) in ("aten.matmul", "aten.bmm", "aten.baddbmm")), None)
    return user is not None


def before_rotary(node: Node, attention: Attention) -> Node:
    """Walks a query or key back to what it was before position was rotated into it; the node itself if it never was."""
    size = old((_numel(node),))
    found, todo, seen = node, [node], {node}
    while todo:
        n = todo.pop()
        if packet(n) in ("aten.linear", "aten.addmm", "aten.matmul", "aten.layer_norm", "aten.rms_norm", "aten.conv2d"):
            continue
        if packet(n) == "aten.mul" and rotates(n, attention):
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


def rotates(node: Node, attention: Attention) -> bool:
    tables = [a for a in node.args[:2] if isinstance(a, Node) and is_table(a)]
    return len(tables) == 1 and len(shape(tables[0])) >= 2 and max(shape(tables[0])[-3:-1]) > 1


def is_table(node: Node) -> bool:
    """A cosine or sine table: it does not come from the tokens."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if packet(n) in ("aten.linear", "aten.conv2d", "aten.conv3d", "aten.addmm"):
            return False
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return True


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if hasattr(value, "numel") else 0


def scores_row(rw: Rewriter, s: Splice, query: Node) -> Node:
    """Softmax rows of the given queries: (B, H, m, d) -> (B, H, m, L), with scale, mask and sizes as in the attention."""
    attention = attention_of(s)
    emit = rw.builder.emit
    key = heads(rw, s, "k", rotated=True)
    if shape(key)[1] != shape(query)[1]:
        key = emit(aten.repeat_interleave.self_int, key, shape(query)[1] // shape(key)[1], 1)
    scores = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -1, -2))
    scale = attention.scale if attention.scale is not None else (shape(query)[-1] ** -0.5 if attention.fused else None)
    if scale is not None:
        scores = emit(aten.mul.Scalar, scores, scale)
    return scores


def unfused_probabilities(rw: Rewriter, s: Splice, attention: Attention) -> Node:
    """The softmax the model itself computes, as (B, H, L, L)."""
    value = rw.env[attention.node]
    sizes, length = shape(value), token_length(rw, s)
    if sizes[-1] != length or sizes[-2] != length:
        raise UnsupportedGraph("the attention is not over the tokens of the residual stream", attention.node,
                               "choose a method that does not read attention")
    b = rw.gather.batch if s.block.batch_axis is not None else 1
    heads_ = value.meta["val"].numel() // (b * length * length)
    return rw.builder.emit(aten.reshape.default, value, [b, heads_, length, length])


def cls_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): how the class token attends; one query row, never the N x N map, beside a fused attention."""
    if s.site.prefix < 1:
        return received_attention(rw, s)
    attention = attention_of(s)
    emit = rw.builder.emit
    if not attention.fused:
        return emit(aten.select.int, unfused_probabilities(rw, s, attention), 2, 0)
    query = emit(aten.slice.Tensor, heads(rw, s, "q", rotated=True), 2, 0, 1)
    scores = masked(rw, s, attention, scores_row(rw, s, query), row=0)
    return emit(aten.select.int, emit(aten.softmax.int, scores, -1), 2, 0)


def received_attention(rw: Rewriter, s: Splice) -> Node:
    """(B, H, L): attention received, the mean over all queries (the one score that costs an N x N map)."""
    attention = attention_of(s)
    emit = rw.builder.emit
    if not attention.fused:
        return emit(aten.mean.dim, unfused_probabilities(rw, s, attention), [2])
    scores = masked(rw, s, attention, scores_row(rw, s, heads(rw, s, "q", rotated=True)), row=None)
    return emit(aten.mean.dim, emit(aten.softmax.int, scores, -1), [2])


def masked(rw: Rewriter, s: Splice, attention: Attention, scores: Node, row: int | None) -> Node:
    """Scores with the mask that the rewritten attention itself uses (it holds log sizes too)."""
    fused = rw.env[attention.node]
    mask = bind(fused)["attn_mask"] if packet(fused) == SDPA else None
    if mask is None:
        return scores
    emit = rw.builder.emit
    if row is not None and shape(mask)[-2] > 1:
        mask = emit(aten.slice.Tensor, mask, -2, row, row + 1)
    if str(mask.meta["val"].dtype) == "torch.bool":
        return emit(aten.where.ScalarOther, mask, scores, float("-inf"))
    return emit(aten.add.Tensor, scores, mask)


def normed(rw: Rewriter, s: Splice) -> Node:
    """(B, L, D): the residual stream after the model's final norm; as it is where no such norm is found."""
    x = rw.standard(rw.env[s.at], s.block)
    last = rw.structure.blocks[-1]
    for user in (last.end or last.mid).users:
        if packet(user) in ("aten.layer_norm", "aten.rms_norm"):
            args = {**bind(user), "input": x}
            args = {k: rw.env_or_copy(v) if isinstance(v, Node) and k != "input" else v for k, v in args.items()}
            schema = user.target._schema
            return rw.builder.emit(user.target, *(args[a.name] for a in schema.arguments if not a.kwarg_only))
    return x


READERS: dict[str, Any] = {
    "q": lambda rw, s: heads(rw, s, "q"),
    "k": lambda rw, s: heads(rw, s, "k"),
    "v": lambda rw, s: heads(rw, s, "v"),
    "cls_attention": cls_attention,
    "received_attention": received_attention,
    "normed": normed,
}
