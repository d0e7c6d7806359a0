"""Looking ahead: the attention of the block at whose entrance a reduction stands, computed on all tokens that come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from tokcompile.passes.memory import ancestors_of

if TYPE_CHECKING:
    from tokcompile.passes.rewrite import Rewriter
    from tokcompile.passes.splice import Splice


@contextmanager
def look_ahead(rw: Rewriter, s: Splice) -> Iterator[None]:
    """While open, the nodes from the place of the reduction to the block's attention have their values without it.

    The walk writes them anew for the tokens that are left. What of these nodes no tap reads (values, the fused attention
    itself) is taken out, and its FLOPs are not counted.
    """
    targets = [a.node for a in s.block.attentions]
    order = rw.structure.order

    def to_come(node: Node) -> bool:
        return node is not s.at and node not in rw.env

    needed = sorted(ancestors_of(targets, to_come), key=order.__getitem__)
    inside = followers_among(needed, s.at)
    read = ancestors_of([n for a in s.block.attentions for n in ((a.q, a.k) if a.fused else (a.node,))], to_come)
    kept = rw.env[s.at], rw.labels.get(s.at), rw.full.copy(), rw.builder.origin
    put(rw, s.at, *rw.before[s.at])
    for node in needed:
        rw.builder.origin = node
        rw.step(node)
        if node in read and node in inside:
            rw.overhead_flops += flops(rw, node)
    try:
        yield
    finally:
        for node in reversed(needed):
            if node in inside:
                new = rw.env.pop(node, None)
                rw.labels.pop(node, None)
                if isinstance(new, Node) and not new.users:  # a fused attention counts as random, and never as dead code
                    rw.builder.graph.erase_node(new)
        put(rw, s.at, *kept[:2])
        rw.full, rw.builder.origin = kept[2:]


def put(rw: Rewriter, node: Node, value: Node, label: object) -> None:
    rw.env[node] = value
    rw.labels.pop(node, None)
    if label is not None:
        rw.labels[node] = label


def flops(rw: Rewriter, node: Node) -> int:
    """Those of the new node that stands for an old one."""
    new = rw.env[node]
    if not isinstance(new, Node) or new.op != "call_function":
        return 0
    args, kwargs = map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
    with rw.builder.mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        new.target(*args, **kwargs)
    return counter.get_total_flops()


def followers_among(nodes: list[Node], start: Node) -> set[Node]:
    """Those of the nodes, which are in order, that depend on `start`."""
    found = {start}
    for node in nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found - {start}
