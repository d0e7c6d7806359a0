"""A bias on the keys (proportional attention's log sizes) as one more channel of q and k instead of a pass over the scores.

q·k + b is (q | 1)·(k | b): two concatenations over N x H rows cost less than adding b to H x N x N scores once N is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, maker, named, only_user

LEAST = 128  # keys; below it the addition is as fast (measured in onnxruntime, 6 heads of 64)


@dataclass
class Operand:
    """One side of q k^T: the value, the factor on the way to the product, who reads the value on that way (node, input), for
    each axis of the product's side the axis of the value, and the axis of its channels."""

    value: ir.Value
    factor: float
    read_at: tuple[ir.Node, int]
    axes: list[int]
    channels: int

    def shape(self, channels: int | None = None) -> list[int]:
        """Of the value, or of one that has so many channels."""
        assert self.value.shape is not None
        size = list(self.value.shape.numpy())
        return size if channels is None else [*size[: self.channels], channels, *size[self.channels + 1 :]]


def row_bias_channel(graph: ir.Graph) -> int:
    """Rewrites Add(MatMul(q, k^T), b), b over keys and the same for all heads and queries, that only a Softmax reads."""
    count = 0
    for add in list(graph):
        if add.op_type == "Add" and only_user(add.outputs[0], "Softmax") and (found := match(add)) is not None:
            widen(graph, add.outputs[0], *found)
            count += 1
    if count:
        graph.sort()  # the bias may be computed after what now reads it
    return count


def match(add: ir.Node) -> tuple[ir.Value, Operand, Operand, ir.Value] | None:
    """The scores before such an Add, q, k and the bias."""
    at = next((i for i, value in enumerate(add.inputs) if maker(value, "MatMul")), None)
    if at is None:
        return None
    product, bias = maker(add.inputs[at], "MatMul"), add.inputs[1 - at]
    if product is None or only_user(product.outputs[0], "Add") is None or bias is None or constant(bias) is not None:
        return None
    shape = product.outputs[0].shape
    if shape is None or bias.shape is None or len(bias.shape) != len(shape) or bias.dtype is None:
        return None
    *outer, _, keys = shape.numpy()
    small, (*wide, queries, columns) = len(outer) - 1, bias.shape.numpy()
    if keys < LEAST or columns != keys or queries != 1 or wide[small] != 1 or list(wide[:small]) != list(outer[:small]):
        return None
    # with samples of a batch before the heads the transposition of k is done by itself, and is cheaper without the channel
    q, k = operand(product, 0, channels=-1), operand(product, 1, channels=-2, deep=len(outer) < 2)
    return None if q is None or k is None else (product.outputs[0], q, k, bias)


def operand(product: ir.Node, side: int, channels: int, deep: bool = True) -> Operand | None:
    """Walks back from the product over factors and transposes, as far as the channels are last; not deep: over factors."""
    value, reader, factor = product.inputs[side], (product, side), 1.0
    if value is None or value.shape is None:
        return None
    axes, best = list(range(len(value.shape))), None
    while value is not None and value.shape is not None:
        if not deep or axes[channels] == len(axes) - 1:
            best = Operand(value, factor, reader, list(axes), axes[channels])
        node = value.producer()
        if not deep and maker(value, "Transpose"):
            break
        if node is not None and node.op_type == "Transpose" and len(list(value.consumers())) > 1:
            node, value = own_copy(node, reader)
        if node is None or len(list(value.consumers())) != 1 or value.is_graph_output():
            break
        if node.op_type == "Transpose":
            perm = list(node.attributes["perm"].as_ints())
            axes, reader = [perm[axis] for axis in axes], (node, 0)
            value = node.inputs[0]
        elif node.op_type == "Mul" and (at := scalar(node)) is not None:
            number = constant(node.inputs[at])
            assert number is not None
            factor, reader = factor * float(number.item()), (node, 1 - at)
            value = node.inputs[1 - at]
        else:
            break
    return best


def own_copy(node: ir.Node, reader: tuple[ir.Node, int]) -> tuple[ir.Node, ir.Value]:
    """The same node once more, for one reader: the others (a reduction that reads the keys) go on with the old one."""
    made, old = ir.Node("", node.op_type, node.inputs, list(node.attributes.values())), node.outputs[0]
    made.name, value = f"{node.name}.own", made.outputs[0]
    value.name, value.shape, value.type = f"{old.name}.own", old.shape, old.type
    at, place = reader
    assert at.graph is not None
    at.graph.insert_before(at, made)
    at.replace_input_with(place, value)
    return made, value


def scalar(node: ir.Node) -> int | None:
    """Which input of a product is one number."""
    numbers = [constant(value) for value in node.inputs]
    return next((i for i, number in enumerate(numbers) if number is not None and number.size == 1 and number.item()), None)


def widen(graph: ir.Graph, added: ir.Value, scores: ir.Value, q: Operand, k: Operand, bias: ir.Value) -> None:
    """Gives k a channel of the bias, and q one that cancels the factors which both meet later; the scores are then what was
    added up."""
    assert bias.dtype is not None
    assert bias.shape is not None
    dtype, name = bias.dtype.numpy(), added.name
    ones = np.full(q.shape(1), 1 / (q.factor * k.factor), dtype)
    insert(graph, q, named(graph, f"{name}_ones", ones), f"{name}.q", [])

    shape = [1] * len(k.axes)  # the bias stands on the axes of q k^T, where one query stands for the channel
    for place, size in enumerate(bias.shape.numpy()):
        shape[k.axes[place]] = int(size)
    nodes = [ir.Node("", "Reshape", [bias, named(graph, f"{name}_place", np.array(shape))])]
    nodes[-1].outputs[0].shape = ir.Shape(shape)
    heads = k.axes[-3]
    if shape[heads] != (count := k.shape()[heads]):  # the same for all of them: here quicker than Expand
        nodes.append(ir.Node("", "Concat", [nodes[-1].outputs[0]] * count, [ir.AttrInt64("axis", heads)]))
        nodes[-1].outputs[0].shape = ir.Shape(k.shape(1))
    insert(graph, k, nodes[-1].outputs[0], f"{name}.k", nodes)
    added.replace_all_uses_with(scores)


def insert(graph: ir.Graph, side: Operand, channel: ir.Value, name: str, nodes: list[ir.Node]) -> None:
    """Puts the channel beside the others, just before they are read; `nodes` make it."""
    reader, at = side.read_at
    joined = ir.Node("", "Concat", [side.value, channel], [ir.AttrInt64("axis", side.channels)])
    joined.outputs[0].shape = ir.Shape(side.shape(side.shape()[side.channels] + 1))
    for i, node in enumerate([*nodes, joined]):
        node.name, node.outputs[0].name, node.outputs[0].type = f"node_{name}.{i}", f"{name}.{i}", side.value.type
    graph.insert_before(reader, [*nodes, joined])
    reader.replace_input_with(at, joined.outputs[0])
    spread(side)


def spread(side: Operand) -> None:
    """The values on the way to the product have one channel more."""
    node = side.read_at[0]
    while node.op_type != "MatMul":
        out = node.outputs[0]
        assert out.shape is not None
        if node.op_type == "Transpose":
            shape = node.inputs[0].shape  # type: ignore[union-attr]
            assert shape is not None
            out.shape = ir.Shape([shape.numpy()[axis] for axis in node.attributes["perm"].as_ints()])
        else:
            out.shape = next(v.shape for v in node.inputs if v is not None and constant(v) is None)
        node = next(iter(out.consumers()))
