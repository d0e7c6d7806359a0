"""Cost: FLOPs of a graph as products of axis sizes, so that other token counts cost no second rewrite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from torch.fx import Graph, Node

from tokcompile.passes.graph import bind, packet, shape
from tokcompile.passes.rules.core import rank_of
from tokcompile.passes.rules.experts import PRODUCTS
from tokcompile.passes.tokens import Axis, Batch, Label, Seq, Space, is_labelled, old, plain

CONVOLUTIONS = {
    "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.convolution",
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """factor * product of axis sizes, in FLOPs (a multiply and an add count as two)."""

    node: Node
    factor: int | Fraction
    axes: tuple[Axis, ...]

    def value(self, counts: Mapping[Space, int]) -> int:
        return int(self.factor * prod(axis_size(axis, counts) for axis in self.axes))


def axis_size(axis: Axis, counts: Mapping[Space, int]) -> int:
    out = 1
    for atom in axis:
        if isinstance(atom, Seq):
            out *= sum(part_size(p, counts) for p in atom.parts)
        else:
            out *= atom.size if isinstance(atom, Batch) else atom
    return out


def part_size(part: int | Space, counts: Mapping[Space, int]) -> int:
    if isinstance(part, int):
        return part
    if part.groups is not None:
        return part.unit * part_size(part.groups, counts)
    if not part.sources:
        return counts.get(part, part.k)
    sizes = [part_size(p, counts) for p in part.sources]
    return sum(map(min, sizes, part.most)) if part.most else sum(sizes)


def terms(
    graph: Graph, labels: Mapping[Node, Any], recovered: Iterable[Node] = (), mixed: Mapping[Node, Axis] | None = None
) -> list[Term]:
    """One term per matrix product, attention and convolution of the OLD graph, sized as in the rewritten one.

    mixed: see `Rewritten`; what such a module costs grows with its token axis.
    """
    full = set(recovered)

    def label_of(node: Node) -> Label:
        own = None if node in full else labels.get(node)
        return own if own is not None and not isinstance(own, list) and is_labelled(own) else plain(shape(node))

    out = []
    for node in graph.nodes:
        maker = MAKERS.get(packet(node))
        if maker is not None:
            inputs = (lambda n: plain(shape(n))) if node in full else label_of
            factor, axes = maker(node, bind(node), label_of(node), inputs)
            if mixed and node in mixed:
                whole = factor * prod(old(axis) for axis in axes)
                out.append(Term(node, Fraction(whole, old(mixed[node])), (mixed[node],)))
            else:
                out.append(Term(node, factor, tuple(axes)))
    return out


def total(all_terms: Iterable[Term], counts: Mapping[Space, int] | None = None) -> int:
    return sum(t.value(counts or {}) for t in all_terms)


def richer(a: Axis, b: Axis) -> Axis:
    return a if rank_of(a) >= rank_of(b) else b


Made = tuple[int, list[Axis]]
Labels = Callable[[Node], Label]


def linear(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    return 2, [*out, label(a["input"])[-1]]


def product(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    left, right = (
        [n for n in node.all_input_nodes if len(shape(n)) >= 1][-2:]
        if len(node.all_input_nodes) > 1
        else (node.all_input_nodes * 2)
    )
    left, right = label(left), label(right)
    inner = richer(left[-1], right[-2] if len(right) > 1 else right[-1])
    return 2, [*out, inner]


def attention(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    query, key, value = (label(a[name]) for name in ("query", "key", "value"))
    width = shape(a["query"])[-1] + shape(a["value"])[-1]
    return 2 * width, [*out[:-1], richer(key[-2], value[-2])] if query else []


def convolution(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    weight = shape(a["weight"])
    if "transpose" in packet(node) or a.get("transposed"):
        source = label(a["input"])
        return 2 * prod(weight[1:]), [*source]
    return 2 * prod(weight[1:]), [*out]


def einsum(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    axes: dict[str, Axis] = {}
    for term, tensor in zip(a["equation"].partition("->")[0].split(","), a["tensors"]):
        for letter, axis in zip(term, label(tensor)):
            axes[letter] = richer(axes.get(letter, ()), axis)
    return 2, list(axes.values())


def grouped(node: Node, a: dict[str, Any], out: Label, label: Labels) -> Made:
    """Each row meets the weights of one expert."""
    return 2, [*out, label(node.args[0])[-1]]


MAKERS: dict[str, Callable[..., Made]] = {
    "aten.linear": linear,
    "aten.scaled_dot_product_attention": attention,
    "aten.einsum": einsum,
    **dict.fromkeys(PRODUCTS, grouped),
    **dict.fromkeys(("aten.matmul", "aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm"), product),
    **dict.fromkeys(CONVOLUTIONS, convolution),
}
