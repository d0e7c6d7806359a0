"""Canonicalise: one functional form of the graph, without what carries no meaning at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.causal import write_causal_masks
from tokcompile.passes.choices import write_everywhere
from tokcompile.passes.equations import write_out_equations
from tokcompile.passes.fold import fold_constants
from tokcompile.passes.functionalise import functionalise
from tokcompile.passes.graph import bind, copy_graph, filled, get_attr, packet, propagate_shapes, replace_results
from tokcompile.passes.interpolation import write_interpolations
from tokcompile.passes.memory import CASTS, VIEWS, base_of, mutates, whole
from tokcompile.passes.mosaic import write_mosaics
from tokcompile.passes.permutations import fix_permutations
from tokcompile.passes.placeholders import fix_placeholders
from tokcompile.passes.pooling import write_poolings
from tokcompile.passes.rejoin import rejoin
from tokcompile.passes.round_trips import write_round_trips
from tokcompile.passes.vmap import flatten_vmap
from tokcompile.passes.written import write_joins

ASSERTS = {
    "aten._assert_async", "aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size", "aten._functional_assert_scalar", "aten._functional_assert_async",
}  # fmt: skip
IDENTITIES = {"aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.lift"}
PADS = {"aten.pad", "aten.constant_pad_nd"}
DROPOUTS = {
    "aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout", "aten.native_dropout",
    "aten.dropout_", "aten.feature_dropout_",
}  # fmt: skip
ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "absolute": "abs", "negative": "neg",
    "clip": "clamp", "concat": "cat", "concatenate": "cat", "greater": "gt", "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
OF_TWO = {"aten.max.other": torch.ops.aten.maximum.default, "aten.min.other": torch.ops.aten.minimum.default}
OPERATORS = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}
FILLS = {"aten.zeros_like": 0, "aten.ones_like": 1}
FIXED = "fixed_values"  # the key in the graph module's meta


def canonicalise(gm: GraphModule, inputs: list[Any]) -> GraphModule:
    """Returns an equal graph: functional, no asserts, no no-ops, constants folded, all-true masks gone; `gm` is kept."""
    gm = copy_graph(gm)
    inline_regions(gm)
    flatten_vmap(gm)
    drop_asserts(gm)
    one_name_each(gm)
    refuse_random(gm)
    drop_identities(gm)
    refuse_state(gm)
    fold_constants(gm)
    functionalise(gm)
    let_views_copy(gm)
    propagate_shapes(gm, inputs)
    if write_out_fills(gm):
        fold_constants(gm)
    drop_no_ops(gm)
    if write_joins(gm):
        propagate_shapes(gm, inputs)
    write_interpolations(gm)
    write_out_equations(gm)
    share_equal_views(gm)
    if write_everywhere(gm):
        fold_constants(gm)
    drop_true_masks(gm)
    if write_causal_masks(gm):
        propagate_shapes(gm, inputs)
        fold_constants(gm)
    rejoin(gm)
    gm.meta[FIXED] = fix_permutations(gm, inputs) + write_poolings(gm, inputs) + fix_placeholders(gm, inputs)
    gm.graph.eliminate_dead_code()
    propagate_shapes(gm, inputs)
    write_round_trips(gm)
    if write_mosaics(gm):
        propagate_shapes(gm, inputs)
    gm.recompile()
    return gm


def let_views_copy(gm: GraphModule) -> None:
    """A view holds for values that lie in memory as they did while tracing. A folded constant may lie otherwise, and so may
    what an attention kernel gives: another device has another one."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def one_name_each(gm: GraphModule) -> None:
    """Ops that are other names of others, as rules know them."""
    for node in gm.graph.nodes:
        name = packet(node).removeprefix("aten.")
        plain, in_place = ALIASES.get(name.removesuffix("_")), "_" * name.endswith("_")
        known = OPERATORS.get(name) or (plain and plain + in_place)
        if str(node.target) in OF_TWO:
            node.target = OF_TWO[str(node.target)]
        elif node.op == "call_function" and known:
            node.target = getattr(getattr(torch.ops.aten, known), node.target._overloadname, node.target)


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
        env: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args[at + 1 :]))
        with gm.graph.inserting_before(node):
            for n in inner.graph.find_nodes(op="get_attr"):
                env[n] = gm.graph.get_attr(f"{node.args[at].target}.{n.target}")
            result = gm.graph.graph_copy(inner.graph, env)
        replace_results(node, result)


def write_out_fills(gm: GraphModule) -> bool:
    """`zeros_like(x)[:, :, 0]` holds nothing of x: it becomes a constant, and the mask that is made of it does too. Returns
    whether there was any."""
    found = False
    for node in list(gm.graph.nodes):
        value, like = FILLS.get(packet(node)), node.meta.get("val")
        cut = node.users and all(packet(u) in ("aten.select", "aten.slice") for u in node.users)
        if value is None or not cut or not isinstance(like, torch.Tensor) or not like.is_contiguous():
            continue
        filled(gm, node, value)
        found = True
    return found


def refuse_random(gm: GraphModule) -> None:
    """A random op draws new tokens on every call: nothing static can be said about it."""
    for node in gm.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags:
            # dropout and recurrent layers draw only in training, attention only where it drops some of its weights
            if bind(node).get("train") is False or bind(node).get("dropout_p") == 0:
                continue
            raise UnsupportedGraph(
                "the model draws random numbers at inference", node, "optimize the part of the model after the random step"
            )


def drop_identities(gm: GraphModule) -> None:
    """Ops that hand their operand on (it may be changed in place afterwards, so this comes first)."""
    for node in list(gm.graph.nodes):
        name = packet(node)
        copies = name == "aten.lift_fresh_copy"
        dropout = name in DROPOUTS and not bind(node).get("train", False)
        if not copies and (name in IDENTITIES or dropout or hands_on(node)):
            forward(gm, node, node.args[0])


def hands_on(node: Node) -> bool:
    """Whether a cast gives the very tensor that it was given, so that who writes into one writes into the other. Of an input
    that nothing else reads it stays: nobody sees who writes into that."""
    if packet(node) not in ("aten.to", "aten.type_as") or not same_type(node):
        return False
    source, asked = node.args[0], bind(node)
    alone = source.op == "placeholder" and len(source.users) == 1
    return not alone and not asked.get("copy") and asked.get("memory_format") is None


def refuse_state(gm: GraphModule) -> None:
    """A model that changes its own buffers gives another result on every call."""
    for node in gm.graph.nodes:
        if mutates(node) and isinstance(node.args[0], Node) and base_of(node.args[0]).op == "get_attr":
            raise UnsupportedGraph(
                "the model changes a buffer of its own in forward", node,
                "optimize the part of the model that keeps no state",
            )  # fmt: skip


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
        no_op = (
            name in IDENTITIES or whole(node) or (name in CASTS and same_type(node)) or (name in PADS and not any(node.args[1]))
        )
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
