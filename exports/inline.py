"""Writes what a function does as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from tokcompile.passes.graph import get_attr


def inline(
    graph: Graph,
    mode: FakeTensorMode,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    constant: Callable[[Tensor], Node],
    **how: Any,
) -> Any:
    """Traces a call with values like those of its nodes, writes its ops at the end of the graph, or where that inserts now, and
    returns its results there. constant: gives the node of a tensor that the function holds. how: options of make_fx."""
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    nodes = [a for a in flat if isinstance(a, Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(a, Node) else a for a in flat], spec)
        return function(*args, **kwargs)

    with mode, torch.no_grad():
        body = make_fx(call, **how)(*(node.meta["val"] for node in nodes))
    for node in body.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):  # of torch.tensor(...)
        node.replace_all_uses_with(node.args[0])
        body.graph.erase_node(node)
    body.graph.eliminate_dead_code()  # functions of dtypes, whose results are known
    known: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for node in body.graph.find_nodes(op="get_attr"):
        value = get_attr(body, node.target)
        held = value.constant if isinstance(value, FakeTensor) else value
        assert held is not None, f"{function} holds a tensor without values: {node.format_node()}"
        known[node] = constant(held)
    return graph.graph_copy(body.graph, known)
