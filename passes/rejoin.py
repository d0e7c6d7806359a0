"""Rejoin: what is taken apart and put together again in the same order (images handled one by one) is one view."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from tokcompile.passes.graph import aten, bind, packet, shape

APART = {"aten.unbind", "aten.split", "aten.split_with_sizes", "aten.chunk"}


def rejoin(gm: GraphModule) -> None:
    """cat(unbind(x, 0), 0) becomes flatten(x, 0, 1); cat(split(x, d), d), stack(unbind(x, d), d) and the only
    piece of a split become x."""
    for node in list(gm.graph.nodes):
        if packet(node) in APART - {"aten.unbind"} and len(node.meta["val"]) == 1:  # into one piece
            for piece in list(node.users):
                piece.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(piece)
            gm.graph.erase_node(node)
            continue
        source = source_of(node) if packet(node) in ("aten.cat", "aten.stack") else None
        if source is None:
            continue
        taken, whole = packet(source), source.args[0]
        dim, own = bind(node)["dim"] % len(shape(node)), bind(source).get("dim", 0) % len(shape(whole))
        if (taken == "aten.unbind") == (packet(node) == "aten.stack"):
            if dim != own:
                continue
        elif taken == "aten.unbind" and dim == own == 0:
            with gm.graph.inserting_before(node):
                whole = gm.graph.call_function(aten.flatten.using_ints, (whole, 0, 1))
            whole.meta = dict(node.meta)
        else:
            continue
        node.replace_all_uses_with(whole)
        gm.graph.erase_node(node)


def source_of(node: Node) -> Node | None:
    """The op whose results, all of them and in order, are the operands of a cat or stack."""
    pieces = node.args[0]
    source = pieces[0].args[0] if pieces[0].target is operator.getitem else None
    if source is None or packet(source) not in APART or len(source.meta["val"]) != len(pieces):
        return None
    same = all(p.target is operator.getitem and p.args == (source, i) for i, p in enumerate(pieces))
    return source if same else None
