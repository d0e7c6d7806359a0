"""What is done to most tokens is done to all before these are taken, and what is taken twice is taken once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, maker, named, replace


def slice_last(graph: ir.Graph) -> int:
    """Means over heads and normalisation come before one Slice, which copies less."""
    count = 0
    for node in list(graph):
        narrow = maker(node.inputs[0], "Slice") if node.inputs else None
        if narrow is None or (at := taken(narrow)) is None:
            continue
        (axis, rows), source, out = at, narrow.inputs[0], node.outputs[0]
        assert source is not None
        assert source.shape is not None
        shape = list(source.shape.numpy())
        axes = constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
        over_heads = axes is not None and axes.tolist() == [1] and axis == 2 and not node.attributes["keepdims"].value
        if node.op_type == "Slice" and (then := taken(node)) is not None and then[0] == axis:
            rows = rows[then[1].start : then[1].stop : then[1].step]
            replace(graph, out, [take(graph, source, axis, rows, out)])
        elif 2 * len(rows) > shape[axis] and (over_heads or (node.op_type == "LpNormalization" and axis < len(shape) - 1)):
            whole = ir.Node("", node.op_type, [source, *node.inputs[1:]], list(node.attributes.values()))
            whole.outputs[0].shape = ir.Shape([shape[0], *shape[2:]] if over_heads else shape)
            replace(graph, out, [whole, take(graph, whole.outputs[0], axis - over_heads, rows, out)])
        else:
            continue
        count += 1
    return count


def taken(node: ir.Node) -> tuple[int, range] | None:
    """(axis, which ones) of a Slice along one axis."""
    given, source = [constant(v) for v in node.inputs[1:]], node.inputs[0]
    if len(given) < 3 or any(v is None or v.size != 1 for v in given) or source is None or source.shape is None:
        return None
    start, stop, axis, step = (int(v.item()) for v in [*given, np.array(1)][:4] if v is not None)
    return (axis, range(source.shape.numpy()[axis])[start:stop:step]) if axis >= 0 and step > 0 else None


def take(graph: ir.Graph, source: ir.Value, axis: int, which: range, out: ir.Value) -> ir.Node:
    """A Slice that takes these."""
    given = {"start": which.start, "stop": which.stop, "axis": axis, "step": which.step}
    return ir.Node("", "Slice", [source, *(named(graph, f"{out.name}_{k}", np.array([v])) for k, v in given.items())])
