"""Memory: which nodes look at the same tensor, which write into it, and what depends on the inputs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import GraphModule, Node

from tokcompile.passes.graph import RESHAPES, bind, packet, user_dependent

VIEWS = RESHAPES | {
    "aten.expand", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze", "aten.slice", "aten.select",
    "aten.expand_as", "aten.view_as", "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind",
    "aten.movedim", "aten.swapaxes", "aten.diagonal", "aten.alias", "aten.detach", "aten.numpy_T", "aten.mT", "getitem",
    "aten.unsafe_chunk", "aten.unsafe_split", "aten.unsafe_split_with_sizes",
}  # fmt: skip
TRUE_VIEWS = {  # never a copy
    "aten.view", "aten.expand", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze", "aten.slice",
    "aten.select", "aten.expand_as", "aten.narrow", "aten.diagonal",
}  # fmt: skip
COPIES = {"aten.contiguous", "aten.to"}  # as far as they are not dropped for doing nothing
CASTS = {"aten.to", "aten._to_copy", "aten.type_as"}


def is_view(node: Node) -> bool:
    """Whether a node may look at the memory of its first argument; of several results only those of an op that gives views."""
    if packet(node) != "getitem":
        return packet(node) in VIEWS or (packet(node) not in COPIES and shares_memory(node))
    source = node.args[0]
    return not isinstance(source, Node) or source.op != "call_function" or is_view(source)


def shares_memory(node: Node) -> bool:
    """Whether an op says that it gives what its argument holds, and writes nothing: unfold, complex numbers as pairs."""
    schema = getattr(node.target, "_schema", None)
    given = [r.alias_info for r in schema.returns if r.alias_info] if node.op == "call_function" and schema else []
    return any(not alias.is_write for alias in given)


def base_of(node: Node) -> Node:
    """The tensor that a chain of views looks at."""
    while is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def views_from(base: Node, view: Node) -> list[Node]:
    """The views that lead from `base` to `view`, in order."""
    out = []
    while view is not base:
        out.append(view)
        view = view.args[0]
    return out[::-1]


def views_of(base: Node) -> list[Node]:
    """All views that look at a tensor."""
    found, todo = [], [base]
    while todo:
        node = todo.pop()
        todo += (new := [u for u in node.users if is_view(u) and u.args[:1] == (node,)])
        found += new
    return found


def readers_after(value: Node, write: Node, order: dict[Node, int]) -> list[Node]:
    """What reads a value once `write` has been done."""
    return [u for u in value.users if order.get(u, 0) > order[write]]


def mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def influenced(gm: GraphModule) -> tuple[set[Node], set[Node]]:
    """What depends on the inputs, directly or through memory that they write into, and the tensors written into."""
    dependent, written = user_dependent(gm.graph), set[Node]()
    while new := written_to(gm, dependent) - written:
        written |= new
        dependent |= reachable_from(new)
    return dependent, written - dependent


def written_to(gm: GraphModule, dependent: set[Node]) -> set[Node]:
    """The tensors that something depending on the inputs writes into, itself or through views."""
    return {base_of(n.args[0]) for n in gm.graph.nodes if n in dependent and mutates(n) and isinstance(n.args[0], Node)}


def reachable_from(nodes: Iterable[Node], through: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """What is computed from these nodes, as far as a way leads there `through` such nodes alone."""
    return reached((u for n in nodes for u in n.users), lambda n: n.users, through)


def ancestors_of(nodes: Iterable[Node], through: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """These nodes and what they are computed from, as far as a way leads there `through` such nodes alone."""
    return reached(nodes, lambda n: n.all_input_nodes, through)


def reached(nodes: Iterable[Node], next_to: Callable[[Node], Iterable[Node]], through: Callable[[Node], bool]) -> set[Node]:
    out: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in out and through(node):
            out.add(node)
            todo.extend(next_to(node))
    return out


def whole(view: Node) -> bool:
    """Whether a slice takes everything."""
    if packet(view) != "aten.slice":
        return False
    a = bind(view)
    return a["step"] == 1 and a["start"] in (None, 0) and (a["end"] is None or a["end"] >= 1 << 62)
