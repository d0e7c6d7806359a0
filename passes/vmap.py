"""Vmap: what torch.export wrote down as levels of torch.vmap becomes plain ops on whole tensors.

The graph then runs by itself, node by node. Attention masks are made this way in some language models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from tokcompile.errors import UnsupportedGraph, first_line
from tokcompile.passes.graph import buffer, get_attr

ENTER, LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def flatten_vmap(gm: GraphModule) -> None:
    """Replaces each region between the first level entered and the last one left, in place. Raises: UnsupportedGraph."""
    for region in regions(gm):
        replace(gm, region)
    for node in list(gm.graph.nodes):
        if named(node, "lazy_load_decompositions"):
            gm.graph.erase_node(node)


def named(node: Node, name: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == name


def regions(gm: GraphModule) -> list[list[Node]]:
    """The calls of each region; constants among them are moved in front of it."""
    out: list[list[Node]] = []
    depth = 0
    for node in list(gm.graph.nodes):
        if named(node, ENTER):
            if depth == 0:
                out.append([])
            depth += 1
        if depth and node.op == "get_attr":
            out[-1][0].prepend(node)
        elif depth:
            out[-1].append(node)
        if named(node, LEAVE):
            depth -= 1
    return out


def replace(gm: GraphModule, region: list[Node]) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))
    tensors = [n for n in inputs if isinstance(value_of(gm, n), torch.Tensor)]
    outputs = [n for n in region if any(u not in inside for u in n.users)]
    flat = plain(gm, region, inputs, tensors, outputs)
    env: dict[Node, Any] = {}
    given = iter(tensors)
    with gm.graph.inserting_before(region[0]):
        for node in flat.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = buffer(gm, f"_vmap_{len(list(gm.buffers()))}", get_attr(flat, node.target), region[0])
            elif node.op == "output":
                results = map_arg(node.args[0], env.__getitem__)
            else:
                env[node] = gm.graph.node_copy(node, env.__getitem__)
                env[node].meta.update({k: v for k, v in outputs[0].meta.items() if k != "val"})
    for old, new in zip(outputs, results):
        new.meta["val"] = old.meta.get("val")
        old.replace_all_uses_with(new)
    for node in reversed(region):
        gm.graph.erase_node(node)


def value_of(gm: GraphModule, node: Node) -> Any:
    return get_attr(gm, node.target) if node.op == "get_attr" else node.meta.get("val")


def plain(gm: GraphModule, region: list[Node], inputs: list[Node], tensors: list[Node], outputs: list[Node]) -> GraphModule:
    """The region as a graph of ops that no longer know of vmap; run on fake tensors, so that sizes cost nothing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True)

    def run(*values: torch.Tensor) -> list[Any]:
        env: dict[Node, Any] = {n: value_of(gm, n) for n in inputs} | dict(zip(tensors, values))
        open_levels = 0
        try:
            for node in region:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
                open_levels += named(node, ENTER) - named(node, LEAVE)
        finally:
            leave = next(node.target for node in region if named(node, LEAVE))
            for _ in range(open_levels):  # only where an op failed; torch would stay inside
                leave()
        return [env[n] for n in outputs]

    shapes = [value_of(gm, n) for n in tensors]
    try:
        with mode, torch.no_grad():
            fakes = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in shapes]
            return make_fx(run, tracing_mode="real")(*fakes)
    except Exception as error:
        raise UnsupportedGraph(
            f"a function under torch.vmap cannot be written as plain ops ({first_line(error)[:200]})",
            region[0],
            "write it with broadcasting instead of torch.vmap",
        ) from error
