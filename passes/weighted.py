"""Weighted sums: sums and products over tokens whose weights a softmax has made sum to one, among those that are left.

Any other sum means all tokens: one that was merged counts as often as it holds tokens, and one that is gone is missing.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from tokcompile.passes.find import BETWEEN, MATMUL, SOFTMAX, mixes_heads
from tokcompile.passes.graph import bind, is_tensor, packet, shape, user_dependent

SUMS = {"aten.sum", "aten.mean", "aten.nansum"}
# what else may stand between the softmax and the sum: choices of heads, and norms over them
AFTER = {"aten.select", "aten.unbind", "aten.layer_norm", "aten.index_select", "aten.relu"} | BETWEEN - {"aten.add"}

NORMS = SUMS | {"aten.linalg_vector_norm"}
PROPORTIONAL = {
    "aten.mul", "aten.div", "aten.reciprocal", "aten.pow", "aten.neg", "aten.to", "aten._to_copy", "aten.view", "aten.reshape",
    "aten.permute", "aten.transpose", "aten.expand", "aten.unsqueeze", "aten.squeeze", "aten.contiguous", "aten.clone",
    "aten.flatten", "aten.mT", "aten.expand_as",
}  # fmt: skip


def weighted_sums(graph: Graph) -> set[Node]:
    """All of them, of a canonical graph."""
    dependent, found = user_dependent(graph), set()
    for softmax in graph.nodes:
        if packet(softmax) not in SOFTMAX:
            continue
        length = shape(softmax)[bind(softmax)["dim"]]
        seen, todo = {softmax}, [softmax]
        while todo:
            node = todo.pop()
            name = packet(node)
            if (name in SUMS and sums_along(node, softmax)) or (name in MATMUL and not mixes_heads(node, dependent)):
                found.add(node)
            if goes_on(node, softmax, length, dependent):
                todo += [user for user in node.users if user not in seen]
                seen.update(node.users)
    return found


def sums_along(node: Node, softmax: Node) -> bool:
    """Whether a sum runs along the axis of a softmax."""
    sizes, rank = shape(softmax), len(shape(node.args[0]))
    dim, axis = bind(node).get("dim"), bind(softmax)["dim"] % len(sizes)
    dims = range(rank) if dim in (None, []) else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    return axis in dims if shape(node.args[0]) == sizes else any(shape(node.args[0])[d] == sizes[axis] for d in dims)


def goes_on(node: Node, softmax: Node, length: int, dependent: set[Node]) -> bool:
    """Whether weights are still weights behind an op."""
    name = packet(node)
    if node is softmax or node.op != "call_function" or not is_tensor(node):
        return node is softmax or not is_tensor(node)  # pieces are taken of lists
    if name in MATMUL:
        return mixes_heads(node, dependent)
    if name in SUMS:  # over heads
        return length in shape(node)
    return name in AFTER or (name == "aten.add" and shape(node) == shape(softmax))  # of two maps


def shares(graph: Graph, tokens: set[Node], lengths: set[int]) -> set[Node]:
    """Sums over tokens that are divided by another sum over the same ones, before or after it, as in linear attention: what is
    gone is missing in both. tokens: what depends on those that are left; lengths: of axes of tokens."""
    norms = (n for n in graph.nodes if n in tokens and packet(n) in NORMS and lengths & {*shape(n.args[0])})
    divided = {node for norm in norms for node, upside_down in scaled(norm) if upside_down}
    sums = (node for node in graph.nodes if node in tokens and packet(node) in NORMS | MATMUL)
    return {node for node in sums if node in divided or any(one in divided for one, _ in scaled(node))}


def scaled(node: Node) -> set[tuple[Node, bool]]:
    """What is proportional to a value, or to one over it."""
    seen, todo = {(node, False)}, [(node, False)]
    while todo:
        one, upside_down = todo.pop()
        for user in one.users:
            name = packet(user)
            alone = name in ("aten.add", "aten.clamp", "aten.clamp_min") and len(user.all_input_nodes) == 1
            if name not in PROPORTIONAL | MATMUL and not alone:
                continue
            inverts = name == "aten.reciprocal" or (name == "aten.div" and user.args[1] is one)
            inverts |= name == "aten.pow" and isinstance(user.args[1], (int, float)) and user.args[1] < 0
            state = user, upside_down != inverts
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen
