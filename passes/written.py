"""Written: a tensor of which a piece of one axis is replaced (x[:, 1:] = y) is the join of what is left and what is written."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tokcompile.passes.graph import aten, bind, emitter, packet, shape, stand_in


def write_joins(gm: GraphModule) -> bool:
    """Writes slice_scatter and select_scatter as cat, in place. Returns: whether there are any."""
    found = [n for n in gm.graph.nodes if packet(n) in ("aten.slice_scatter", "aten.select_scatter")]
    for node in found:
        write_join(gm, node)
    return bool(found)


def write_join(gm: GraphModule, node: Node) -> None:
    """Leaves every second token and the like as they are."""
    call, emit = bind(node), emitter(gm, node)
    base, piece, size = call["self"], call["src"], shape(node)
    dim = call["dim"] % len(size)
    if "index" in call:
        start = call["index"] % size[dim]
        stop = start + 1
        piece = emit(aten.unsqueeze.default, piece, dim)
    else:
        start, stop, _ = slice(call["start"], call["end"]).indices(size[dim])
        if call["step"] != 1 or list(shape(piece)) != [*size[:dim], stop - start, *size[dim + 1 :]]:
            return
    before = [emit(aten.slice.Tensor, base, dim, 0, start)] if start else []
    after = [emit(aten.slice.Tensor, base, dim, stop, size[dim])] if stop < size[dim] else []
    stand_in(node, emit(aten.cat.default, [*before, piece, *after], dim))
