"""Functionalise: in-place ops become ops that give a new tensor, and everything that looks at the memory is given it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.graph import aten, get_attr, packet
from tokcompile.passes.memory import TRUE_VIEWS, base_of, is_view, mutates, readers_after, views_from, views_of, whole


def functionalise(gm: GraphModule) -> None:
    """Turns in-place ops into functional ones where nothing else looks at the changed memory; refuses the rest."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not mutates(node):
            continue
        changed = node.args[0]
        functional = functional_overload(node)
        if functional is None or aliased(changed, node, order):
            rewritten = rewrite_copy(gm, node, order)
            if rewritten:
                continue
            raise UnsupportedGraph(
                "an in-place op changes memory that other values share",
                node,
                "write it out of place, or pass ep.run_decompositions({}) of your exported program",
            )
        node.target = functional
        for user in readers_after(changed, node, order):
            user.replace_input_with(changed, node)


def replace_overwritten(gm: GraphModule) -> None:
    """A buffer that is written whole before anything reads it keeps nothing from one call to the next, such as rotary angles
    that depend on the length: in place, what is written into it is read instead."""
    for node in list(gm.graph.nodes):
        if packet(node) != "aten.copy_" or node.args[0].op != "get_attr" or not isinstance(node.args[1], Node):
            continue
        buffer, value = get_attr(gm, node.args[0].target), node.args[1].meta["val"]
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        reads = [n for n in gm.graph.nodes if n.op == "get_attr" and same_memory(get_attr(gm, n.target), buffer)]
        users = [(read, user) for read in reads for user in read.users if user is not node]
        early = any(order[user] < order[node] or read.target != node.args[0].target for read, user in users)
        if early or (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            continue
        with gm.graph.inserting_before(node):
            written = gm.graph.call_function(aten.clone.default, (node.args[1],))
        written.meta = dict(node.meta)
        for read, user in users:
            user.replace_input_with(read, written)
        node.replace_all_uses_with(written)
        gm.graph.erase_node(node)
    gm.recompile()


def same_memory(one: Any, other: Any) -> bool:
    alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.device == other.device
    return one is other or (alike and one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def functional_overload(node: Node) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`, or None."""
    name = node.target._schema.name.replace("aten::", "")
    if not name.endswith("_") or not isinstance(node.args[0], Node):
        return None
    functional = f"__{name[3:]}" if name.startswith("__i") else name[:-1]  # __ior__ is the in-place form of __or__
    overloads = getattr(aten, functional, None)
    return getattr(overloads, node.target._overloadname, None) if overloads else None


def aliased(changed: Node, by: Node, order: dict[Node, int]) -> bool:
    """Whether memory changed in place is seen through another node afterwards, or belongs to an input or a weight."""
    base = base_of(changed)
    if base.op in ("placeholder", "get_attr"):
        return True
    older = [v for v in (base, *views_of(base)) if v is not changed and order.get(v, 0) < order[by]]
    return any(readers_after(v, by, order) for v in older)


def rewrite_copy(gm: GraphModule, node: Node, order: dict[Node, int]) -> bool:
    """`base[view] op= value`, written through one chain of views, as scatters back into a new `base`."""
    chain: list[Node] = []
    base = node.args[0]
    while isinstance(base, Node) and packet(base) in ("aten.slice", "aten.select") and base.op == "call_function":
        chain.append(base)
        base = base.args[0]
    if not isinstance(base, Node) or base.op == "placeholder" or is_view(base):
        return False
    if base.op == "get_attr" and not str(base.target).startswith("_folded_"):
        return False  # a weight or a buffer would change from call to call; a folded constant was made anew each time
    older = [v for v in sorted(views_of(base), key=lambda v: order.get(v, 0))
             if v is not node.args[0] and order.get(v, 0) < order[node] and readers_after(v, node, order)]  # fmt: skip
    if not all(packet(w) in TRUE_VIEWS for v in older for w in views_from(base, v)):
        return False
    with gm.graph.inserting_before(node):
        result = value = written(gm, node)
        if value is None:
            return False
        for view in chain:
            if whole(view):
                continue
            scatter = aten.slice_scatter.default if packet(view) == "aten.slice" else aten.select_scatter.default
            value = gm.graph.call_function(scatter, (view.args[0], value, *view.args[1:]), view.kwargs)
        value.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for old in older:  # it sees the write too
            new = value
            for view in views_from(base, old):
                new = gm.graph.call_function(view.target, (new, *view.args[1:]), view.kwargs)
                new.meta = dict(view.meta)
                order[new] = order[node]
            for user in readers_after(old, node, order):
                user.replace_input_with(old, new)
    for user in readers_after(base, node, order):
        user.replace_input_with(base, value)
    for user in readers_after(node.args[0], node, order):
        user.replace_input_with(node.args[0], result)  # the view that was written through, read again
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return True


def written(gm: GraphModule, node: Node) -> Node | None:
    """What an in-place op writes, as a new value; None for an op without a functional form."""
    if packet(node) != "aten.copy_":
        functional = functional_overload(node)
        return None if functional is None else gm.graph.call_function(functional, node.args, node.kwargs)
    value = gm.graph.call_function(aten.expand_as.default, (node.args[1], node.args[0]))
    into, given = node.meta.get("val"), node.args[1].meta.get("val")
    if into is not None and (given is None or given.dtype != into.dtype):
        value = gm.graph.call_function(aten.to.dtype, (value, into.dtype))
    return value
