"""Weighted sums: sums and products over tokens whose weights a softmax has made sum to one, among those that are left.

Any other sum means all tokens: one that was merged counts as often as it holds tokens, and one that is gone is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isclose, prod

from torch.fx import Graph, Node

from tokcompile.passes.attentions import BETWEEN, MATMUL, SOFTMAX, mixes_heads, operands
from tokcompile.passes.graph import RESHAPES, bind, is_tensor, packet, shape, user_dependent
from tokcompile.passes.origin import LAYOUT, moved

SUMS = {"aten.sum", "aten.mean", "aten.nansum"}
# what else may stand between the softmax and the sum: choices of heads, and norms over them
AFTER = {
    "aten.unbind", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.stack", "aten.layer_norm", "aten.index_select",
    "aten.relu",
} | BETWEEN - {"aten.add"}  # fmt: skip
# of these, what weights that are shared out among more tokens come through as such
LINEAR = RESHAPES | LAYOUT | SUMS | {
    "aten.mul", "aten.div", "aten.neg", "aten.add", "aten.sub", "aten.to", "aten._to_copy", "aten.type_as", "aten.expand",
    "aten.expand_as", "aten.unsqueeze", "aten.squeeze", "aten.select", "aten.slice", "aten.index_select", "aten.unbind",
    "aten.stack", "aten.dropout", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.nan_to_num", "getitem",
}  # fmt: skip
ORDER = RESHAPES | {"aten.unsqueeze", "aten.squeeze", "aten.contiguous", "aten.clone"}  # values in the order that they had

NORMS = {"aten.sum", "aten.nansum", "aten.linalg_vector_norm"}
PROPORTIONAL = {
    "aten.mul", "aten.div", "aten.reciprocal", "aten.pow", "aten.neg", "aten.to", "aten._to_copy", "aten.view", "aten.reshape",
    "aten.permute", "aten.transpose", "aten.expand", "aten.unsqueeze", "aten.squeeze", "aten.contiguous", "aten.clone",
    "aten.flatten", "aten.mT", "aten.expand_as", "aten.sum",
}  # fmt: skip


@dataclass
class Weights:
    """Where the weights of softmaxes go. sums: those over the axis of a softmax: it, the operand that holds its weights, and
    their axis there. axes: for what is linear in weights, the axis along which each softmax made them one."""

    sums: dict[Node, set[tuple[Node, Node, int]]] = field(default_factory=dict)
    axes: dict[Node, dict[Node, int]] = field(default_factory=dict)

    def counted(self, node: Node, count: int) -> bool:
        """Whether weights are multiplied with a number."""
        return isclose(factor(node), count) or any(self.counted(n, count) for n in node.all_input_nodes if n in self.axes)


def weights(graph: Graph) -> Weights:
    """All of them, of a canonical graph."""
    dependent, found = user_dependent(graph), Weights()
    on: dict[Node, dict[Node, int | None]] = {}  # None where a view has joined the axis with others
    for node in graph.nodes:
        name, sources = packet(node), [n for n in node.all_input_nodes if n in on]
        if name in SOFTMAX:
            dim = bind(node)["dim"] % len(shape(node))
            on[node], found.axes[node] = {node: dim}, {node: dim}
            continue
        for source in sources:
            for softmax, axis in on[source].items():
                length = shape(softmax)[found.axes[softmax][softmax]]
                along = (d for d in summed(node, source) if axis == d or (axis is None and shape(source)[d] == length))
                found.sums.setdefault(node, set()).update((softmax, source, d) for d in along)
                if goes_on(node, softmax, length, dependent):
                    there = None if axis is None else behind(node, source, axis)
                    same = on.setdefault(node, {}).setdefault(softmax, there) == there
                    on[node][softmax] = there if same else None
                elif name in MATMUL and axis is not None and (there := beside(node, source, axis)) is not None:
                    on.setdefault(node, {})[softmax] = there
        linear = [n for n in sources if n in found.axes]
        if node in on and linear and (name in LINEAR or name in MATMUL) and keeps_shares(node, linear):
            axes = {s: a for s, a in on[node].items() if a is not None and any(s in found.axes[n] for n in linear)}
            found.axes |= {node: axes} if axes else {}
    return found


def summed(node: Node, source: Node) -> Iterable[int]:
    """The axes of an operand that an op sums over."""
    name, a = packet(node), bind(node) if node.op == "call_function" else {}
    if name in SUMS | NORMS:
        return along(node, source)
    if name == "aten.einsum":
        return [d for term in terms_of(node, source) for d, c in enumerate(term) if c not in a["equation"].partition("->")[2]]
    if name in MATMUL and source in operands(node):
        left, right = operands(node)
        last = len(shape(source)) - 1
        return [last] * (source is left) + [max(last - 1, 0)] * (source is right)
    return []


def along(node: Node, source: Node) -> Iterable[int]:
    """The axes of its operand along which an op such as a sum or a largest of all runs."""
    dim, rank = bind(node).get("dim"), len(shape(source))
    return range(rank) if dim in (None, []) else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]


def beside(node: Node, source: Node, axis: int) -> int | None:
    """Where an axis of an operand is in a product along another one; None where it is gone."""
    if packet(node) == "aten.einsum":
        return behind(node, source, axis)
    if len(shape(source)) < 2:
        return None
    left, right = operands(node)
    end = axis - len(shape(source))
    stays = (source is left and end == -2) or (source is right and end == -1)
    return len(shape(node)) + end if stays else None


def terms_of(einsum: Node, source: Node) -> list[str]:
    inputs = einsum.args[0].partition("->")[0].split(",")
    return [term for term, n in zip(inputs, einsum.args[1]) if n is source]


def goes_on(node: Node, softmax: Node, length: int, dependent: set[Node]) -> bool:
    """Whether weights are still weights behind an op."""
    name = packet(node)
    if name in MATMUL:
        return mixes_heads(node, dependent)
    if name in SUMS:  # over heads
        return length in shape(node)
    return name in AFTER or name == "getitem" or (name == "aten.add" and shape(node) == shape(softmax))  # of two maps


def behind(node: Node, source: Node, axis: int) -> int | None:
    """Where an axis of an operand is in the result of an op; None where it is no longer one by itself."""
    name, a = packet(node), bind(node)
    if name == "getitem":  # of a list of pieces
        return axis
    before, after = shape(source), shape(node) if is_tensor(node) else ()
    if name in ORDER:
        lead = prod(before[:axis])
        return next((d for d, n in enumerate(after) if prod(after[:d]) == lead and n == before[axis] != 1), None)
    if name in LAYOUT:
        return next(d for d in range(len(after)) if moved(node, d) == axis)
    if name == "aten.einsum":
        places = [a["equation"].partition("->")[2].find(term[axis]) for term in terms_of(node, source)]
        return next((d for d in places if d >= 0), None)
    if name in ("aten.select", "aten.unbind") or name in SUMS:
        gone = {a["dim"] % len(before)} if name not in SUMS else set() if a.get("keepdim") else set(summed(node, source))
        return None if axis in gone else axis - sum(d < axis for d in gone)
    if name == "aten.stack":
        return axis + (a["dim"] % len(after) <= axis)
    if name in ("aten.linear", "aten.layer_norm") and axis == len(before) - 1:
        return None
    return axis + len(after) - len(before) if after else axis  # aligned from the right, as in a broadcast


def keeps_shares(node: Node, linear: list[Node]) -> bool:
    """Whether an op on weights is linear in them, all together."""
    name, tensors = packet(node), [n for n in node.all_input_nodes if is_tensor(n)]
    if name in ("aten.add", "aten.sub", "aten.stack"):
        numbers = name != "aten.stack" and not all(isinstance(v, Node) for v in node.args[:2])
        return len(linear) == len(tensors) and not numbers
    if name in ("aten.mul", "aten.div"):
        return len(linear) == 1 and node.args[0] is not node.args[1] and (name == "aten.mul" or node.args[0] is linear[0])
    return len(linear) == 1 or name in MATMUL


def shares(graph: Graph, tokens: set[Node], lengths: set[int]) -> dict[Node, set[Node]]:
    """Sums over tokens that are divided by another sum over the same ones, before or after it, as in linear attention: what is
    gone is missing in both; and these others. tokens: what depends on those that are left; lengths: of axes of tokens."""
    sums = [n for n in graph.nodes if n in tokens and packet(n) in NORMS | MATMUL and lengths & lengths_summed(n)]
    reached = {one: scaled(one) for one in sums}
    over = {one: {n for n, upside_down in states if not upside_down} for one, states in reached.items()}
    under = {one: {n for n, upside_down in states if upside_down} for one, states in reached.items()}
    norms = [one for one in sums if packet(one) in NORMS and under[one]]
    roots = set().union(*(under[one] for one in norms if is_root(one)))
    found: dict[Node, set[Node]] = {}
    for norm in norms:
        divided = {one for one in sums if one is not norm and (one in under[norm] or over[one] & under[norm])}
        if is_root(norm):  # of which it takes two to divide a sum
            divided = {one for one in divided if packet(one) in MATMUL and roots.issuperset(operands(one))}
        for one in divided:
            found.setdefault(one, set()).add(norm)
            found.setdefault(norm, set()).add(one)
    return found


def factor(node: Node) -> float:
    """The number that an op multiplies its first operand by; 1 for other ops."""
    by = node.args[1] if packet(node) in ("aten.mul", "aten.div") else None
    return 1 if not isinstance(by, int | float) or not by else by if packet(node) == "aten.mul" else 1 / by


def averaged(total: Node, count: int) -> bool:
    """Whether a sum is divided by the number of its tokens, before or behind it."""
    return divides(total, count) or any(divided_before(n, count) for n in total.all_input_nodes)


def divides(value: Node, count: int) -> bool:
    """Whether all that becomes of a value is divided by a number."""

    def goes(user: Node) -> bool:
        once = sum(a is value for a in user.args[:2]) == 1 or packet(user) == "aten.einsum"
        inverts = packet(user) in ("aten.reciprocal", "aten.pow") or (packet(user) == "aten.div" and user.args[0] is not value)
        return packet(user) in PROPORTIONAL | MATMUL and once and not inverts and divides(user, count)

    return bool(value.users) and all(isclose(factor(u) * count, 1) or goes(u) for u in value.users)


def divided_before(value: Node, count: int) -> bool:
    if isclose(factor(value) * count, 1):
        return True
    return packet(value) in PROPORTIONAL - {"aten.reciprocal", "aten.pow", "aten.sum"} and divided_before(value.args[0], count)


def is_root(norm: Node) -> bool:
    return packet(norm) == "aten.linalg_vector_norm" and bind(norm)["ord"] != 1


def lengths_summed(node: Node) -> set[int]:
    """The lengths of the axes that an op sums over."""
    return {shape(n)[d] for n in node.all_input_nodes if is_tensor(n) for d in summed(node, n)}


def keeps_from_zero(node: Node) -> bool:
    """Whether an op only keeps a divisor from being zero, as no number that counts does."""
    if packet(node) not in ("aten.add", "aten.clamp", "aten.clamp_min") or len(node.all_input_nodes) > 1:
        return False
    number = bind(node)["other" if packet(node) == "aten.add" else "min"]
    most = 1e-3 if packet(node) == "aten.add" else 1  # which no count is less than
    return isinstance(number, int | float) and number <= most and bind(node).get("max") is None


def scaled(node: Node) -> set[tuple[Node, bool]]:
    """What is proportional to a value, or to one over it."""
    seen, todo = {(node, False)}, [(node, False)]
    while todo:
        one, upside_down = todo.pop()
        for user in one.users:
            name = packet(user)
            if name not in PROPORTIONAL | MATMUL and not keeps_from_zero(user):
                continue
            inverts = name == "aten.reciprocal" or (name == "aten.div" and user.args[1] is one)
            if name == "aten.pow" and user.args[1] != -1:
                continue
            inverts |= name == "aten.pow"
            state = user, upside_down != inverts
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen
