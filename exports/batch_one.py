"""A batch of one need not be there: what is computed on [1, N, D] and [1, k] is computed on [N, D] and [k]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, is_full, maker, named, replace, reshaped

ELEMENTWISE = frozenset(
    ("Abs", "Add", "Cast", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Log", "Max", "Min", "Mul", "Neg")
    + ("Pow", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh", "Where")
)
# where the axes stand that an op works along: in an attribute, or at one of its inputs
AXIS = frozenset(("ArgMax", "Concat", "Gather", "LayerNormalization", "LpNormalization", "ScatterElements", "Softmax", "TopK"))
AXES = {"ReduceL1": 1, "ReduceL2": 1, "ReduceMax": 1, "ReduceMean": 1, "ReduceSum": 1, "Slice": 3}
MATRICES = frozenset(("LayerNormalization", "MatMul", "Softmax", "Transpose"))  # these are left with two axes at least


def drop_batch(graph: ir.Graph) -> int:
    """Drops a leading 1 of tensors of rank 2 to 4 wherever an op can do without.

    onnxruntime would reshape before and after each GEMM; it takes transposed heads into a MatMul of rank 3 but not 4; and
    rows are gathered and scattered by indices without a batch. Each new node is followed by a Reshape to the old shape,
    which `reshape_once` passes by; only an old Transpose stays for its other readers, as it may vanish in what follows.
    """
    flat: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(graph):
        if node.op_type == "Reshape" and node.inputs[0] in flat and is_full(constant(node.inputs[1])):
            node.replace_input_with(0, flat[node.inputs[0]])
        batched = batched_inputs(node, flat)
        moved = move_axes(node, len(batched[0].shape or ())) if batched else None
        if moved is None:
            continue
        inputs = [without(graph, node, v, flat) if v in batched else v for v in node.inputs]
        if node.op_type in AXES:
            inputs[AXES[node.op_type]] = named(graph, f"{node.outputs[0].name}_axes", np.array(moved))
        attributes = [a for a in node.attributes.values() if a.name not in ("axis", "perm")]
        if node.op_type in AXIS:
            attributes.append(ir.AttrInt64("axis", moved[0]))
        if node.op_type == "Transpose":
            attributes.append(ir.AttrInt64s("perm", moved))
        made = ir.Node("", node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=f"{node.name}.flat")
        graph.insert_before(node, made)
        for old, new in zip(node.outputs, made.outputs):
            assert old.shape is not None
            shape, flat[old] = list(old.shape.numpy()), new
            new.shape, new.type, new.name = ir.Shape(shape[1:]), old.type, f"{old.name}.flat"
            if node.op_type != "Transpose":
                back = ir.Node("", "Reshape", [new, named(graph, f"{old.name}_shape", np.array(shape))])
                replace(graph, old, [back])
                flat[back.outputs[0]] = new
        count += 1
    return count


def batched_inputs(node: ir.Node, flat: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
    """The inputs with a leading 1 that can be dropped; none if this op, or one of its tensors, cannot do without it."""
    present = [v for v in node.inputs if v is not None]
    if node.domain or not present or any(v.shape is None or v.shape.is_dynamic() for v in (*present, *node.outputs)):
        return []
    shapes = {v: v.shape.numpy() for v in (*present, *node.outputs) if v.shape is not None}
    given = present[:1] if node.op_type == "Gather" else present
    rank = max(len(shapes[v]) for v in given)
    batched = [v for v in given if len(shapes[v]) == rank]
    if any(len(shapes[v]) < 2 or shapes[v][0] != 1 for v in node.outputs) or any(shapes[v][0] != 1 for v in batched):
        return []
    if rank == 4 and not any(v in flat or maker(v, "Reshape") for v in batched):
        return []  # heads were split off by a Reshape; images stay as they are
    return batched if (3 if node.op_type in MATRICES else 2) <= rank <= 4 else []


def move_axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes this op works along once the first is gone; None if it works along that one, or the op is unknown."""
    if node.op_type in ELEMENTWISE or node.op_type == "MatMul":
        return []
    if node.op_type == "Transpose":
        first, *rest = node.attributes["perm"].as_ints()
        return None if first else [axis - 1 for axis in rest]
    if node.op_type in AXIS and "axis" in node.attributes:
        axes = [node.attributes["axis"].as_int()]
    elif node.op_type in AXES and len(node.inputs) > AXES[node.op_type]:
        known = constant(node.inputs[AXES[node.op_type]])
        axes = [] if known is None else known.tolist()
    else:
        return None
    moved = [axis % rank - 1 for axis in axes]
    return moved if moved and min(moved) >= 0 else None


def without(graph: ir.Graph, node: ir.Node, value: ir.Value, flat: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value without its leading 1, made before `node` unless it is there already."""
    if value not in flat:
        assert value.shape is not None
        shape, known = value.shape.numpy()[1:], constant(value)
        if known is not None:
            flat[value] = named(graph, f"{value.name}_flat", known[0])
        else:
            flat[value] = reshaped(graph, node, value, shape, f"{value.name}.flat")
    return flat[value]
