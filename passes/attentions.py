"""Attention as a graph has it: a fused op, or a softmax between two matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tokcompile.passes.causal import hides_the_future
from tokcompile.passes.graph import bind, packet, shape

SDPA = "aten.scaled_dot_product_attention"
SOFTMAX = {"aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.special_softmax"}
MATMUL = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"}
# what may stand between a score matmul and its softmax, or between the softmax and the value matmul; sinks are joined to the
# scores, and cut off after the softmax
BETWEEN = {
    "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.where", "aten.masked_fill", "aten.to", "aten._to_copy",
    "aten.view", "aten.reshape", "aten.permute", "aten.transpose", "aten.expand", "aten.contiguous", "aten.clone",
    "aten.linear", "aten.conv2d", "aten.type_as", "aten.dropout", "aten.clamp", "aten.float", "aten._unsafe_view",
    "aten.flatten", "aten.unsqueeze", "aten.squeeze", "aten.maximum", "aten.nan_to_num", "aten.tanh", "aten.expand_as",
    "aten.slice_scatter", "aten.cat", "aten.slice", "aten.mT", "aten.swapaxes", "aten.swapdims", "aten.movedim",
    "aten.select",
}  # fmt: skip


@dataclass
class Attention:
    """One attention: `node` is the fused op or the softmax; q, k, v as the graph has them."""

    node: Node
    q: Node
    k: Node
    v: Node
    fused: bool
    scale: float | None = None
    mask: Node | None = None
    causal: bool = False


def attentions(graph: Graph, dependent: set[Node]) -> Iterator[Attention]:
    """Every fused attention, and every softmax between two matmuls."""
    for node in graph.nodes:
        if node not in dependent:
            continue
        name = packet(node)
        if name == SDPA:
            a = bind(node)
            yield Attention(node, a["query"], a["key"], a["value"], True, a["scale"], a["attn_mask"], a["is_causal"])
        elif name in SOFTMAX:
            scores = walk(node.args[0], dependent, back=True)
            value = next((v for u in node.users if (v := walk(u, dependent, back=False, source=node))), None)
            if scores is not None and value is not None:
                yield unfused(node, scores, value)


def is_causal(gm: GraphModule, attention: Attention, dependent: set[Node]) -> bool:
    """Whether the mask of an attention lets no query see a later key, as in a language model."""
    if attention.fused or not attention.node.args:
        return hides_the_future(gm, attention.mask)
    scores = attention.node.args[0]
    if packet(scores) == "aten.where":  # where(mask, filling, scores), or the other way round
        return hides_the_future(gm, scores.args[0], marks_hidden=scores.args[2] in dependent)
    if packet(scores) == "aten.masked_fill":
        return hides_the_future(gm, scores.args[1], marks_hidden=True)
    return any(hides_the_future(gm, n) for n in scores.all_input_nodes)


def walk(node: Any, dependent: set[Node], *, back: bool, source: Node | None = None, depth: int = 16) -> Any:
    """The matmul that feeds a softmax (back), or the one it feeds together with the operand it comes in by."""
    if not isinstance(node, Node) or depth == 0 or node not in dependent:
        return None
    if packet(node) in MATMUL and not mixes_heads(node, dependent):
        return node if back else (node, source)
    norm_of_heads = not back and packet(node) == "aten.layer_norm"
    if packet(node) not in BETWEEN | MATMUL and not norm_of_heads:
        return None
    nexts = node.all_input_nodes if back else list(node.users)
    for n in nexts:
        found = walk(n, dependent, back=back, source=node, depth=depth - 1)
        if found is not None:
            return found
    return None


def mixes_heads(node: Node, dependent: set[Node]) -> bool:
    """Whether a product only mixes scores by a square weight, as of heads that talk to each other."""
    given = [n for n in operands(node) if isinstance(n, Node)]
    weights = [shape(n) for n in given if n not in dependent]
    same = any(prod(shape(n)) == prod(shape(node)) for n in given if n in dependent)
    return same and len(weights) == 1 and len(weights[0]) > 1 and weights[0][-1] == weights[0][-2] != shape(node)[-1]


def unfused(softmax: Node, scores: Node, value: tuple[Node, Node]) -> Attention:
    q, k = operands(scores)[:2]
    if keys_first(softmax, scores):
        q, k = k, q
    matmul, weights = value
    v = next((o for o in operands(matmul) if o is not weights), operands(matmul)[-1])
    return Attention(softmax, q, k, v, False)


def keys_first(softmax: Node, scores: Node) -> bool:
    """Whether the product of queries and keys has the keys, over which the softmax runs, as its first operand."""
    if shape(scores) != shape(softmax):
        return False
    rank = len(shape(scores))
    dim = bind(softmax)["dim"] % rank
    if packet(scores) != "aten.einsum":
        return bool(dim == rank - 2)
    inputs, _, output = scores.args[0].partition("->")
    first, second = inputs.split(",")[:2]
    return output[dim] in first and output[dim] not in second


def operands(node: Node) -> list[Node]:
    if packet(node) == "aten.einsum":
        return list(node.args[1])
    if packet(node) == "aten.baddbmm":
        return [node.args[1], node.args[2]]
    return [node.args[0], node.args[1]]
