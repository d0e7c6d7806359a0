"""Equal forms that a runtime does faster: small rewrites of exported graphs, chosen in the rows of `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from tokcompile.exports.batch_one import drop_batch
from tokcompile.exports.head_mean import head_mean
from tokcompile.exports.hidden_rows import hidden_rows
from tokcompile.exports.indices import look_up
from tokcompile.exports.rewriting import constant, is_full, maker, named, only_user, replace
from tokcompile.exports.row_bias import row_bias_channel


@dataclass
class Packed:
    """x W + b that holds q, k and v, and for each place where one of them is read which it is and the value."""

    x: ir.Value
    weight: np.ndarray
    name: str
    bias: np.ndarray | None
    shape: list[int]  # [B, N, 3, H, d]
    parts: list[tuple[int, ir.Value]]


def split_qkv(graph: ir.Graph) -> int:
    """One GEMM that gives q, k and v packed becomes three, as packed results must be copied apart.

    From Reshape(x W + b, [B, N, 3, H, d]), transposed to [3, B, H, N, d], read by Slice and Squeeze along axis 0.
    """
    found = [packed for node in graph if (packed := match_packed(node)) is not None]
    for packed in found:
        split(graph, packed)
    return len(found)


def match_packed(transpose: ir.Node) -> Packed | None:
    """What `split_qkv` looks for, if this is its Transpose and nothing else reads what lies between."""
    if transpose.op_type != "Transpose" or list(transpose.attributes["perm"].as_ints()) != [2, 0, 3, 1, 4]:
        return None
    reshape = maker(transpose.inputs[0], "Reshape")
    flat = reshape.inputs[0] if reshape is not None else None
    if reshape is None or flat is None or flat.shape is None or len(flat.shape) != 3 or not only_user(flat, "Reshape"):
        return None
    add, bias, linear = maker(flat, "Add"), None, flat
    if add is not None:
        bias = next((v for v in map(constant, add.inputs) if v is not None), None)
        linear = next(v for v in add.inputs if v is not None and constant(v) is None)
        if bias is None or not only_user(linear, "Add"):
            return None
    matmul, packed, users = maker(linear, "MatMul"), transpose.outputs[0], transpose.outputs[0].consumers()
    parts = [read for user in users if (read := part_read(user)) is not None]
    if matmul is None or len(parts) < len(users) or packed.is_graph_output():
        return None
    x, weight, shape = matmul.inputs[0], constant(matmul.inputs[1]), reshape.outputs[0].shape
    if x is None or weight is None or weight.ndim != 2 or shape is None or not only_user(reshape.outputs[0], "Transpose"):
        return None
    if bias is not None and bias.shape != weight.shape[1:]:
        return None
    return Packed(x, weight, f"{linear.name}_weight", bias, list(shape.numpy()), parts)


def split(graph: ir.Graph, packed: Packed) -> None:
    """Writes a GEMM of its own for each part."""
    b, n, three, heads, d = packed.shape
    width, name = packed.weight.shape[1] // three, packed.name
    to = named(graph, f"{name}_shape", np.array([b, n, heads, d]))
    for at, old in packed.parts:
        columns, own = slice(at * width, (at + 1) * width), f"{name}_{'qkv'[at]}"
        part = named(graph, own, np.ascontiguousarray(packed.weight[:, columns]))
        nodes = [ir.Node("", "MatMul", [packed.x, part])]
        if packed.bias is not None:
            bias = named(graph, f"{own}_bias", packed.bias[columns])
            nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias]))
        for node in nodes:
            node.outputs[0].shape = ir.Shape([b, n, width])
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], to]))
        nodes[-1].outputs[0].shape = ir.Shape([b, n, heads, d])
        nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", [0, 2, 1, 3])]))
        replace(graph, old, nodes)


def part_read(user: ir.Node) -> tuple[int, ir.Value] | None:
    """(which of three, the value) for one Slice and Squeeze of a packed tensor."""
    if user.op_type != "Slice" or len(user.inputs) < 4 or not (squeeze := only_user(user.outputs[0], "Squeeze")):
        return None
    start, stop, axis = (constant(v) for v in user.inputs[1:4])
    if start is None or stop is None or axis is None or axis.tolist() != [0] or stop[0] - start[0] != 1 or start[0] > 2:
        return None
    return int(start[0]), squeeze.outputs[0]


def slice_last(graph: ir.Graph) -> int:
    """What is done to most tokens is done to all before these are taken, and what is taken twice is taken once.

    Means over heads and normalisation come before one Slice, which copies less.
    """
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


def reshape_once(graph: ir.Graph) -> int:
    """Of two reshapes in a row only the last one counts, and one to the shape that is there already does nothing."""
    count = 0
    for node in list(graph):
        if node.op_type != "Reshape" or not is_full(constant(node.inputs[1])):
            continue
        if before := maker(node.inputs[0], "Reshape"):
            node.replace_input_with(0, before.inputs[0])
            count += 1
        source, out = node.inputs[0], node.outputs[0]
        if source is not None and source.shape is not None and source.shape == out.shape:
            given = source.producer() is None or source.is_graph_output()
            if given and out.is_graph_output():
                continue
            out.replace_all_uses_with(source, replace_graph_outputs=True)
            count += 1
    return count


def transpose_whole(graph: ir.Graph) -> int:
    """The last two axes swapped with those before folded into one becomes a Transpose of the whole, which fuses into a
    product. So torch.onnx writes the keys of attention."""
    count = 0
    for node in list(graph):
        swap = maker(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
        fold = maker(swap.inputs[0], "Reshape") if swap is not None else None
        source = fold.inputs[0] if fold is not None else None
        if swap is None or source is None or source.shape is None or list(swap.attributes["perm"].as_ints()) != [0, 2, 1]:
            continue
        shape, folded, out = source.shape, swap.outputs[0].shape, node.outputs[0].shape
        if folded is None or out is None or len(shape) != len(out) or len(shape) < 3:
            continue
        if [*shape[:-2], shape[-1], shape[-2]] != list(out) or list(folded)[1:] != list(out)[-2:]:
            continue
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        replace(graph, node.outputs[0], [ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", perm)])])
        count += 1
    return count


def lp_norm(graph: ir.Graph) -> int:
    """x / max(|x|, tiny) over the last axis becomes LpNormalization, which gives 0 for 0 too."""
    count = 0
    if graph.opset_imports.get("", 0) >= 22:  # onnxruntime before 1.24 has no kernel of that version
        return count
    for node in list(graph):
        clip = maker(node.inputs[1], "Clip") if node.op_type == "Div" else None
        norm = maker(clip.inputs[0], "ReduceL2") if clip is not None else None
        if clip is None or norm is None or norm.inputs[0] is not node.inputs[0]:
            continue
        if node.outputs[0].dtype != ir.DataType.FLOAT:  # onnxruntime has no half precision kernel
            continue
        axes, least = constant(norm.inputs[1]), constant(clip.inputs[1])
        if axes is None or axes.tolist() != [-1] or least is None or least > 1e-10 or not norm.attributes["keepdims"].value:
            continue
        made = ir.Node("", "LpNormalization", [node.inputs[0]], [ir.AttrInt64("axis", -1), ir.AttrInt64("p", 2)])
        replace(graph, node.outputs[0], [made])
        count += 1
    return count


RULES: Mapping[str, Callable[[ir.Graph], int]] = {
    "hidden_rows": hidden_rows,
    "split_qkv": split_qkv,
    "transpose_whole": transpose_whole,
    "lp_norm": lp_norm,
    "slice_last": slice_last,
    "drop_batch": drop_batch,
    "row_bias_channel": row_bias_channel,
    "look_up": look_up,
    "reshape_once": reshape_once,
    "head_mean": head_mean,
}


def simplify(model: ir.Model, rules: tuple[str, ...]) -> None:
    """Applies the named rules, and drops what each leaves unread, so that the next one counts only what is read."""
    for rule in rules:
        if RULES[rule](model.graph):
            passes.RemoveUnusedNodesPass()(model)
