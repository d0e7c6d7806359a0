"""Softmax under a mask of truth values: what torch.onnx guards at every score is done once for each query, where it is needed.

torch gives zeros to a query that may see no key. The exporter compares all scores with nan for that, a fifth of the time of a
long prompt, and to no use: its masked scores are finite, so such a query gets the mean of all values instead.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from tokcompile.exports.rewriting import constant, maker, named, only_user


def hidden_rows(graph: ir.Graph) -> int:
    """Where(IsNaN(p), 0, p), p = Softmax(scores + Where(mask, 0, least)), becomes p, and what a query without keys gets 0."""
    seeing: dict[ir.Value, ir.Value | None] = {}
    count = 0
    for guard in list(graph):
        found = match(guard)
        if found is None:
            continue
        softmax, bias, product = found
        if bias not in seeing:
            seeing[bias] = rows_that_see(graph, bias, product)
        guard.outputs[0].replace_all_uses_with(softmax.outputs[0])
        if rows := seeing[bias]:
            blank(graph, product, rows)
        count += 1
    return count


def match(guard: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node] | None:
    """The Softmax before such a guard, the bias that stands for its mask, and the product with the values behind it."""
    asked = maker(guard.inputs[0], "IsNaN") if guard.op_type == "Where" else None
    softmax = maker(asked.inputs[0], "Softmax") if asked is not None else None
    product = only_user(guard.outputs[0], "MatMul") if softmax is not None else None
    if softmax is None or product is None or guard.inputs[2] is not softmax.outputs[0] or product.outputs[0].shape is None:
        return None
    add = maker(softmax.inputs[0], "Add")
    for value in add.inputs if add is not None else ():
        choice = maker(value, "Where")
        least = constant(value if choice is None else choice.inputs[2])
        if value is not None and least is not None and least.dtype.kind == "f" and np.isfinite(least).all():
            return softmax, value, product
    return None


def rows_that_see(graph: ir.Graph, bias: ir.Value, product: ir.Node) -> ir.Value | None:
    """(..., queries, 1) whether a query sees any key; None where all do, which only constants can say."""
    known = evaluated(bias)
    if known is None:
        return sees(graph, product, bias)
    rows = (known > np.finfo(known.dtype).min / 2).any(-1, keepdims=True)
    return None if rows.all() else named(graph, f"{bias.name}_sees", rows)


def evaluated(wanted: ir.Value) -> np.ndarray | None:
    """The value if it follows from constants. torch.onnx folds small ones only."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, onnx.TensorProto] = {}
    waiting = [wanted]
    while waiting:
        value = waiting.pop()
        node, number = value.producer(), constant(value)
        if number is not None and value.name:
            constants[value.name] = ir.to_proto(ir.tensor(number, name=value.name))
        elif node is None or node.domain:
            return None
        elif node not in nodes:
            nodes[node] = None
            waiting += [v for v in node.inputs if v is not None]
    if not nodes:
        return constant(wanted)
    from onnx.reference import ReferenceEvaluator

    graph = next(iter(nodes)).graph
    assert graph is not None
    body = onnx.helper.make_graph(
        [ir.to_proto(node) for node in graph if node in nodes],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(wanted.name or "")],
        list(constants.values()),
    )
    opset = onnx.helper.make_opsetid("", graph.opset_imports[""])
    (found,) = ReferenceEvaluator(onnx.helper.make_model(body, opset_imports=[opset])).run(None, {})
    return np.asarray(found)


def sees(graph: ir.Graph, product: ir.Node, bias: ir.Value) -> ir.Value:
    """Computes whether a query sees any key from the mask of truth values that the bias was made of."""
    dtype, choice = product.outputs[0].dtype, bias.producer()
    assert dtype is not None
    assert choice is not None
    mask = choice.inputs[0]
    assert mask is not None
    number = ir.Node("", "Cast", [mask], [ir.AttrInt64("to", dtype)])
    most = ir.Node("", "ReduceMax", [number.outputs[0], named(graph, f"{mask.name}_keys", np.array([-1]))])
    truth = ir.Node("", "Cast", [most.outputs[0]], [ir.AttrInt64("to", ir.DataType.BOOL)])
    rows = None if mask.shape is None else ir.Shape([*mask.shape.numpy()[:-1], 1])
    for i, (node, kind, shape) in enumerate(
        ((number, dtype, mask.shape), (most, dtype, rows), (truth, ir.DataType.BOOL, rows))
    ):
        node.name, node.outputs[0].name = f"node_{mask.name}_sees.{i}", f"{mask.name}_sees.{i}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), shape
    graph.insert_after(choice, [number, most, truth])
    return truth.outputs[0]


def blank(graph: ir.Graph, product: ir.Node, rows: ir.Value) -> None:
    """Zeros instead of what the product gives to queries that see nothing."""
    old = product.outputs[0]
    assert old.dtype is not None
    zero = named(graph, f"{old.name}_none", np.array(0, old.dtype.numpy()))
    node = ir.Node("", "Where", [rows, old, zero], name=f"{product.name}.seen")
    out = node.outputs[0]
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    node.replace_input_with(1, old)
    graph.insert_after(product, node)
    out.shape, out.type, out.name, old.name = old.shape, old.type, old.name, f"{old.name}.unmasked"
