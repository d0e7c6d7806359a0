"""What rewrites of exported graphs are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value is if it is a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_full(shape: np.ndarray | None) -> bool:
    """Whether a Reshape to this shape needs no look at the shape before: a 0 would take a number from there."""
    return shape is not None and bool((shape != 0).all())


def maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that made a value, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def only_user(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of this type and the value is no output."""
    users = [] if value is None or value.is_graph_output() else list(value.consumers())
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def named(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    """A new initializer."""
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(value, name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(made)
    return made


def reshaped(graph: ir.Graph, at: ir.Node, value: ir.Value, shape: Sequence[int], name: str, after: bool = False) -> ir.Value:
    """The value in another shape, under that name, made before a node or after it; a second one has another name."""
    to = named(graph, f"{name}_shape", np.array(shape, np.int64))
    assert to.name is not None
    name += to.name.removeprefix(f"{name}_shape")
    node = ir.Node("", "Reshape", [value, to], name=f"node_{name}")
    out = node.outputs[0]
    out.name, out.shape, out.type = name, ir.Shape(shape), value.type
    graph.insert_after(at, node) if after else graph.insert_before(at, node)
    return out


def replace(graph: ir.Graph, old: ir.Value, nodes: list[ir.Node]) -> None:
    """Puts nodes before the one that made `old`; the last one's result takes its place."""
    before, new, name = old.producer(), nodes[-1].outputs[0], old.name
    assert before is not None
    new.shape = old.shape
    for i, node in enumerate(nodes):
        node.outputs[0].type = old.type
        node.outputs[0].name = f"{name}.{i}"  # torch numbers with underscores
        node.name = f"node_{name}.{i}"
    graph.insert_before(before, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.old", name
