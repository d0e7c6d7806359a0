"""One GEMM that gives q, k and v packed, as three: packed results must be copied apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, maker, named, only_user, replace


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
    """From Reshape(x W + b, [B, N, 3, H, d]), transposed to [3, B, H, N, d], read by Slice and Squeeze along axis 0."""
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
