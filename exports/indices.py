"""Arithmetic on indices is done beforehand: what an index into n things leads to is one of n numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, named, replace

Part = tuple[ir.Value, int, int]  # value * factor + summand


def look_up(graph: ir.Graph) -> int:
    """Sums, products and concatenations of indices become one node a part, a look-up in a table, and one Concat.

    The last node is rewritten first, so that nothing is done for what stands between.
    """
    count = 0
    for node in reversed(list(graph)):
        out = node.outputs[0]
        if node.op_type not in ("Add", "Mul", "Concat") or out.dtype != ir.DataType.INT64:
            continue
        nodes, parts, axis = unfold(out)
        if not 0 < sum(changed(part) for part in parts) + (len(parts) > 1) < nodes:
            continue
        made: list[ir.Node] = []
        values = [write(graph, part, made) for part in parts]
        if len(values) > 1:
            made.append(ir.Node("", "Concat", values, [ir.AttrInt64("axis", axis)]))
        replace(graph, out, made)
        count += 1
    return count


def unfold(value: ir.Value, axis: int | None = None, factor: int = 1, summand: int = 0) -> tuple[int, list[Part], int]:
    """(nodes passed, parts, the axis along which they lie), down to what is not a sum, product or concatenation."""
    node = value.producer()
    if node is not None and node.op_type == "Concat" and axis in (None, node.attributes["axis"].as_int()):
        axis = node.attributes["axis"].as_int()
        found = [unfold(v, axis, factor, summand) for v in node.inputs if v is not None]
        return 1 + sum(n for n, _, _ in found), [part for _, parts, _ in found for part in parts], axis
    if node is not None and node.op_type in ("Add", "Mul"):
        numbers = [constant(v) for v in node.inputs]
        at = next((i for i, number in enumerate(numbers) if number is not None and number.size == 1), None)
        rest = None if at is None else node.inputs[1 - at]
        by = None if at is None else numbers[at]
        if (
            rest is not None
            and by is not None
            and constant(rest) is None
            and rest.shape is not None
            and rest.shape == value.shape
        ):
            inner = (factor, summand + factor * int(by.item())) if node.op_type == "Add" else (factor * int(by.item()), summand)
            nodes, parts, axis = unfold(rest, axis, *inner)
            return 1 + nodes, parts, axis
    return 0, [(value, factor, summand)], axis or 0


def things(value: ir.Value) -> int | None:
    """How many things this value is an index into, if TopK or ArgMax made it."""
    node = value.producer()
    if node is None or node.op_type not in ("TopK", "ArgMax") or value is not node.outputs[-1]:
        return None
    source, axis = node.inputs[0], node.attributes.get("axis")
    if source is None or source.shape is None or axis is None:
        return None
    return int(source.shape.numpy()[axis.as_int()])


def changed(part: Part) -> int:
    """How many nodes `write` makes."""
    value, factor, summand = part
    if constant(value) is not None or (factor == 1 and summand == 0):
        return 0
    return 1 if factor == 1 or summand == 0 or things(value) is not None else 2


def write(graph: ir.Graph, part: Part, made: list[ir.Node]) -> ir.Value:
    """The value of a part; the nodes for it go to `made`."""
    value, factor, summand = part
    known, n, name = constant(value), things(value), f"{value.name}_{factor}_{summand}"
    if known is not None:
        return named(graph, name, known * factor + summand)
    if factor != 1 and n is not None:
        numbers = named(graph, name, np.arange(n) * factor + summand)
        made.append(ir.Node("", "Gather", [numbers, value], [ir.AttrInt64("axis", 0)]))
        made[-1].outputs[0].shape = value.shape
        return made[-1].outputs[0]
    for op, number, neutral in (("Mul", factor, 1), ("Add", summand, 0)):
        if number != neutral:
            made.append(ir.Node("", op, [value, named(graph, f"{name}_{op}", np.array(number))]))
            made[-1].outputs[0].shape = value.shape
            value = made[-1].outputs[0]
    return value
