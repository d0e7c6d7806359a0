"""Canonicalise: one functional form of the graph, without what carries no meaning at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.graph import aten, bind, copy_graph, get_attr, packet, propagate_shapes, user_dependent
from tokcompile.passes.placeholders import fix_placeholders
from tokcompile.passes.rejoin import rejoin
from tokcompile.passes.vmap import flatten_vmap

ASSERTS = {
    "aten._assert_async", "aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size", "aten._functional_assert_scalar", "aten._functional_assert_async",
}  # fmt: skip
IDENTITIES = {"aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.lift"}
DROPOUTS = {
    "aten.dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.feature_alpha_dropout",
    "aten.native_dropout",
    "aten.dropout_",
    "aten.feature_dropout_",
}
CASTS = {"aten.to", "aten._to_copy", "aten.type_as"}
VIEWS = {
    "aten.view", "aten.reshape", "aten.expand", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze",
    "aten.slice", "aten.select", "aten.flatten", "aten.unflatten", "aten.expand_as", "aten.view_as", "aten.narrow",
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.movedim", "aten.swapaxes", "aten.diagonal",
    "aten.alias", "aten.detach", "aten.numpy_T", "aten.mT", "aten._unsafe_view", "getitem",
}  # fmt: skip
FIXED = "fixed_placeholders"  # the key in the graph module's meta
TRUE_VIEWS = {  # never a copy
    "aten.view", "aten.expand", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze", "aten.slice",
    "aten.select", "aten.expand_as", "aten.narrow", "aten.diagonal",
}  # fmt: skip
LARGEST_FOLDED = 1 << 26  # elements; larger constants stay expressions


def canonicalise(gm: GraphModule, inputs: list[Any]) -> GraphModule:
    """Returns an equal graph: functional, no asserts, no no-ops, constants folded, all-true masks gone; `gm` is kept."""
    gm = copy_graph(gm)
    inline_regions(gm)
    flatten_vmap(gm)
    drop_asserts(gm)
    refuse_random(gm)
    drop_identities(gm)
    refuse_state(gm)
    fold_constants(gm)
    functionalise(gm)
    propagate_shapes(gm, inputs)
    drop_no_ops(gm)
    share_equal_views(gm)
    drop_true_masks(gm)
    rejoin(gm)
    gm.meta[FIXED] = fix_placeholders(gm, inputs)
    gm.graph.eliminate_dead_code()
    propagate_shapes(gm, inputs)
    gm.recompile()
    return gm


def inline_regions(gm: GraphModule) -> None:
    """Inlines no_grad and disabled-autocast regions, which change nothing at inference."""
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, Node))
        if name == "wrap_with_autocast" and node.args[2]:
            raise UnsupportedGraph(
                "the model turns autocast on inside its forward",
                node,
                "convert the model's weights and inputs to the wanted dtype before optimizing",
            )
        inner = get_attr(gm, node.args[at].target)
        env: dict[Node, Any] = {}
        arguments = iter(node.args[at + 1 :])
        with gm.graph.inserting_before(node):
            for n in inner.graph.nodes:
                if n.op == "placeholder":
                    env[n] = next(arguments)
                elif n.op == "get_attr":
                    name = f"{node.args[at].target}.{n.target}"
                    env[n] = gm.graph.get_attr(name)
                elif n.op == "output":
                    result = torch.fx.node.map_arg(n.args[0], env.__getitem__)
                else:
                    env[n] = gm.graph.node_copy(n, env.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def refuse_random(gm: GraphModule) -> None:
    """A random op draws new tokens on every call: nothing static can be said about it."""
    for node in gm.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags:
            # dropout and recurrent layers draw only in training
            if packet(node) == "aten.scaled_dot_product_attention" or bind(node).get("train") is False:
                continue
            raise UnsupportedGraph(
                "the model draws random numbers at inference",
                node,
                "optimize the part of the model after the random step",
            )


def drop_identities(gm: GraphModule) -> None:
    """Ops that hand their operand on (it may be changed in place afterwards, so this comes first)."""
    for node in list(gm.graph.nodes):
        name = packet(node)
        copies = name == "aten.lift_fresh_copy"
        if not copies and (name in IDENTITIES or (name in DROPOUTS and not bind(node).get("train", False))):
            forward(gm, node, node.args[0])


def refuse_state(gm: GraphModule) -> None:
    """A model that changes its own buffers gives another result on every call."""
    for node in gm.graph.nodes:
        if mutates(node) and isinstance(node.args[0], Node) and base_of(node.args[0]).op == "get_attr":
            raise UnsupportedGraph(
                "the model changes a buffer of its own in forward", node,
                "optimize the part of the model that keeps no state",
            )  # fmt: skip


def functionalise(gm: GraphModule) -> None:
    """Turns in-place ops into functional ones where nothing else looks at the changed memory; refuses the rest."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if (
            node.op != "call_function"
            or schema is None
            or not schema.is_mutable
            or packet(node) in ASSERTS | IDENTITIES | DROPOUTS
        ):
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
        for user in [u for u in changed.users if order.get(u, 0) > order[node] and u is not node]:
            user.replace_input_with(changed, node)


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
    if changed.op in ("placeholder", "get_attr") or packet(changed) in VIEWS:
        return True
    return any(
        packet(u) in VIEWS and any(order.get(v, 0) > order[by] for v in u.users)
        for u in changed.users
        if order.get(u, 0) < order[by]
    )


def rewrite_copy(gm: GraphModule, node: Node, order: dict[Node, int]) -> bool:
    """`base[view] op= value`, written through one chain of views, as scatters back into a new `base`."""
    chain: list[Node] = []
    base = node.args[0]
    while isinstance(base, Node) and packet(base) in ("aten.slice", "aten.select") and base.op == "call_function":
        chain.append(base)
        base = base.args[0]
    if not isinstance(base, Node) or base.op == "placeholder" or packet(base) in VIEWS:
        return False
    if base.op == "get_attr" and not str(base.target).startswith("_folded_"):
        return False  # a weight or a buffer would change from call to call; a folded constant was made anew each time
    older = [v for v in gm.graph.nodes if v is not node.args[0] and order.get(v, 0) < order[node] and read_later(v, node, order)
             and packet(v) in VIEWS and base_of(v) is base]  # fmt: skip
    if not all(packet(w) in TRUE_VIEWS for v in older for w in views_from(base, v)):
        return False
    with gm.graph.inserting_before(node):
        if packet(node) == "aten.copy_":
            value = gm.graph.call_function(aten.expand_as.default, (node.args[1], node.args[0]))
        else:
            functional = functional_overload(node)
            if functional is None:
                return False
            value = gm.graph.call_function(functional, node.args, node.kwargs)
        result = value
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
            for user in [u for u in old.users if order.get(u, 0) > order[node]]:
                user.replace_input_with(old, new)
    for user in [u for u in base.users if order.get(u, 0) > order[node]]:
        user.replace_input_with(base, value)
    for user in [u for u in node.args[0].users if order.get(u, 0) > order[node]]:
        user.replace_input_with(node.args[0], result)  # the view that was written through, read again
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return True


def read_later(view: Node, write: Node, order: dict[Node, int]) -> bool:
    return any(order.get(u, 0) > order[write] for u in view.users)


def views_from(base: Node, view: Node) -> list[Node]:
    """The views that lead from `base` to `view`, in order."""
    out = []
    while view is not base:
        out.append(view)
        view = view.args[0]
    return out[::-1]


def whole(view: Node) -> bool:
    """Whether a slice takes everything."""
    if packet(view) != "aten.slice":
        return False
    a = bind(view)
    return a["step"] == 1 and a["start"] in (None, 0) and (a["end"] is None or a["end"] >= 1 << 62)


def share_equal_views(gm: GraphModule) -> None:
    """Two equal views of one value become one node, so that a residual stream is one node too."""
    seen: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or packet(node) not in VIEWS or node.kwargs:
            continue
        key = (node.target, torch.fx.node.map_aggregate(node.args, lambda a: tuple(a) if isinstance(a, list) else a))
        try:
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)


def drop_asserts(gm: GraphModule) -> None:
    """Run-time checks of what is fixed here, and numbers that tracing has fixed or that were computed only for checks."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if (
            isinstance(value, (torch.SymInt, torch.SymFloat))
            and not value.node.expr.free_symbols
            and node.op == "call_function"
        ):
            node.replace_all_uses_with(int(value) if isinstance(value, torch.SymInt) else float(value))
        name = getattr(node.target, "__name__", "")
        if packet(node) in ASSERTS or name in ("_assert_scalar", "_check") or node.target == "_guards_fn":
            gm.graph.erase_node(node)
    for node in reversed(list(gm.graph.nodes)):
        number = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))
        if not node.users and node.op == "call_function" and (number or packet(node) == "aten.item"):
            gm.graph.erase_node(node)


def drop_no_ops(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        name = packet(node)
        no_op = name in IDENTITIES or whole(node) or (name in CASTS and same_type(node))
        if no_op or (name in DROPOUTS and not bind(node).get("train", False)):
            forward(gm, node, node.args[0])
        elif name == "aten.cat":
            drop_empty_operands(gm, node)


def forward(gm: GraphModule, node: Node, value: Any) -> None:
    if packet(node) == "aten.native_dropout":
        for user in list(node.users):
            if user.args[1] == 0:
                forward(gm, user, value)
        return
    node.replace_all_uses_with(value)
    gm.graph.erase_node(node)


def same_type(node: Node) -> bool:
    a, b = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.dtype, a.device) == (b.dtype, b.device)


def drop_empty_operands(gm: GraphModule, node: Node) -> None:
    """A key-value cache starts as an empty tensor that the first keys are joined to."""
    tensors = [t for t in node.args[0] if not (isinstance(v := t.meta.get("val"), torch.Tensor) and v.numel() == 0)]
    if len(tensors) == 1:
        forward(gm, node, tensors[0])
    elif 0 < len(tensors) < len(node.args[0]):
        node.args = (tensors, *node.args[1:])


def fold_constants(gm: GraphModule) -> None:
    """Evaluates what does not depend on the inputs (rotary tables, relative biases, masks) into buffers.

    The constant part is run in graph order, so that in-place ops inside it need no rewriting; a value is taken at the
    moment it is first used by what depends on the inputs.
    """
    # what the inputs write into is folded as it is before the write; all that is computed from it stays in the graph
    dependent, written = influenced(gm)
    constant = [n for n in gm.graph.nodes if n not in dependent and n.op not in ("output", "placeholder")]
    frontier = {n for n in constant if foldable(n) and computed(n) and any(u in dependent or u.op == "output" for u in n.users)}
    frontier |= {n for n in written if n in set(constant) and n.op != "get_attr" and foldable(n)}
    needed = ancestors_of(frontier | {n for n in constant if mutates(n)}) if frontier else set()
    if any(n.op == "get_attr" and not_real(get_attr(gm, n.target)) for n in needed):
        return
    values: dict[Node, Any] = {}
    taken: dict[Node, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node in needed:
            values[node] = evaluate(gm, node, values)
            continue
        for n in node.all_input_nodes if node in dependent or node.op == "output" else ():
            if n in frontier and isinstance(values.get(n), torch.Tensor):
                taken.setdefault(n, values[n].detach().clone(memory_format=torch.contiguous_format))
    for i, (node, value) in enumerate(taken.items()):
        if not torch.equal(value, values[node]) and not (value.is_floating_point() and value.isnan().any()):
            raise UnsupportedGraph("a constant is changed in place after it was used", node)
        gm.register_buffer(f"_folded_{i}", value)
        with gm.graph.inserting_before(node):
            folded = gm.graph.get_attr(f"_folded_{i}")
        folded.meta = {k: v for k, v in node.meta.items() if k != "val"}
        node.replace_all_uses_with(folded)
    for node in reversed(constant):  # in-place ops count as impure, so dead code elimination leaves them
        if not node.users:
            gm.graph.erase_node(node)


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


def reachable_from(nodes: set[Node]) -> set[Node]:
    out: set[Node] = set()
    todo = [u for n in nodes for u in n.users]
    while todo:
        node = todo.pop()
        if node not in out:
            out.add(node)
            todo.extend(node.users)
    return out


def base_of(node: Node) -> Node:
    """The tensor that a chain of views looks at."""
    while packet(node) in VIEWS and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def ancestors_of(nodes: set[Node]) -> set[Node]:
    out: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in out:
            out.add(node)
            todo.extend(node.all_input_nodes)
    return out


def mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def not_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or value.is_meta)


def foldable(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() <= LARGEST_FOLDED and "quantize" not in packet(node)


def computed(node: Node) -> bool:
    """Whether a constant is more than a view of a weight (views cost nothing and would copy the weight)."""
    if node.op == "get_attr" or "quantize" in packet(node):
        return False
    return packet(node) not in VIEWS | CASTS or any(computed(n) for n in node.all_input_nodes)


def evaluate(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        value = get_attr(gm, node.target)
        return value.clone() if any(mutates(u) and u.args[0] is node for u in node.users) else value
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    fn = get_attr(gm, node.target) if node.op == "call_module" else node.target
    try:
        with torch.no_grad():
            return fn(*args, **kwargs)
    except Exception as error:
        raise UnsupportedGraph(
            f"a constant of the graph cannot be computed: {error}",
            node,
            "torch.export wrote a graph that does not run by itself; export the parts that do",
        ) from error


def drop_true_masks(gm: GraphModule) -> None:
    """A mask that hides nothing becomes None: fused attention kernels then stay in use."""
    for node in gm.graph.nodes:
        if packet(node) != "aten.scaled_dot_product_attention":
            continue
        mask = bind(node)["attn_mask"]
        if isinstance(mask, Node) and mask.op == "get_attr":
            value = get_attr(gm, mask.target)
            hides = (~value).any() if value.dtype is torch.bool else (value != 0).any()
            if not value.is_meta and not bool(hides):
                node.args = (*node.args[:3], *((None, *node.args[4:]) if len(node.args) > 3 else ()))
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
