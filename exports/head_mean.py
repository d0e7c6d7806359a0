"""The mean over heads of keys that lie token by token, as a mean of slices: onnxruntime reduces a middle axis slowly.

The mean is written over keys with the heads first, as attention has them; the transposition that brought them there is
undone, and what undoes it fuses with it. Keys that come otherwise (rotary ones) have their heads first anyway, and there the
plain mean is the faster one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, maker, named, replace
from tokcompile.plugins.contract import DOMAIN


def head_mean(graph: ir.Graph) -> int:
    """ReduceMean over the heads of (B, H, N, d) or (H, N, d) that is a Transpose of (B, N, H, d) or (N, H, d)."""
    count, given = 0, given_to_bodies(graph)
    for node in list(graph):
        keys = node.inputs[0] if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
        if keys is None or keys.shape is None or keys.dtype != ir.DataType.FLOAT or len(keys.shape) not in (3, 4):
            continue
        heads, axes = len(keys.shape) - 3, constant(node.inputs[1])
        swapped = [*range(heads), heads + 1, heads, heads + 2]
        source = maker(given.get(keys, keys), "Transpose")
        if axes is None or axes.tolist() != [heads] or node.attributes["keepdims"].value:
            continue
        if source is not None and list(source.attributes["perm"].as_ints()) == swapped:
            replace(graph, node.outputs[0], mean(graph, node.outputs[0], keys, swapped))
            count += 1
    return count


def given_to_bodies(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """What the bodies of reductions, which stand beside the model (see `Flat`), are given in it, by their inputs."""
    calls = sorted((n for n in graph if n.domain == DOMAIN), key=lambda n: n.attributes["number"].as_int())
    values = [v for call in calls for v in call.inputs if v is not None]
    return dict(zip(graph.inputs[len(graph.inputs) - len(values) :], values, strict=True))


def mean(graph: ir.Graph, out: ir.Value, keys: ir.Value, swapped: list[int]) -> list[ir.Node]:
    """The nodes that split (B, N, H * d) into what the heads have, and average these."""
    assert keys.shape is not None
    *batch, heads, n, d = keys.shape.numpy()
    flat = named(graph, f"{out.name}_flat", np.array([*batch, n, heads * d], np.int64))
    back = ir.Node("", "Transpose", [keys], [ir.AttrInt64s("perm", swapped)])
    row = ir.Node("", "Reshape", [back.outputs[0], flat])
    parts = [ir.AttrInt64("axis", len(batch) + 1), ir.AttrInt64("num_outputs", heads)]
    each = ir.Node("", "Split", [row.outputs[0]], parts, num_outputs=heads)
    made = [back, row, each, ir.Node("", "Mean", each.outputs)]
    back.outputs[0].shape, row.outputs[0].shape = ir.Shape([*batch, n, heads, d]), ir.Shape([*batch, n, heads * d])
    for i, value in enumerate(each.outputs):
        value.name, value.shape, value.type = f"{out.name}.head_{i}", ir.Shape([*batch, n, d]), out.type
    return made
