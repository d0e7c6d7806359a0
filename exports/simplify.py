"""Equal forms that a runtime does faster: small rewrites of exported graphs, chosen in the rows of `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value is if it is a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of this type and the value is no output."""
    users = list(value.consumers())
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def named(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    """A new initializer."""
    while name in graph.initializers:
        name += "_"
    made = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    made.shape, made.dtype = ir.Shape(value.shape), made.const_value.dtype
    graph.register_initializer(made)
    return made


def replace(graph: ir.Graph, old: ir.Value, nodes: list[ir.Node]) -> None:
    """Puts nodes before the one that made `old`; the last one's result takes its place."""
    new = nodes[-1].outputs[0]
    new.shape, new.dtype, name = old.shape, old.dtype, old.name
    for i, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"{name}.{i}"  # torch numbers with underscores
        node.outputs[0].dtype = old.dtype
    for node in nodes:
        node.name = f"node_{node.outputs[0].name or name}"
    graph.insert_before(old.producer(), nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_old", name


def split_qkv(graph: ir.Graph) -> int:
    """One GEMM that gives q, k and v packed becomes three: packed results must be copied apart, at 4-5 % of a ViT's time.

    From Reshape(x W + b, [B, N, 3, H, d]), transposed to [3, B, H, N, d], read by Slice and Squeeze along axis 0.
    """
    count = 0
    for node in list(graph):
        count += (
            node.op_type == "Transpose"
            and list(node.attributes["perm"].value) == [2, 0, 3, 1, 4]
            and split_one(graph, node)
        )
    return count


def split_one(graph: ir.Graph, transpose: ir.Node) -> bool:
    reshape = transpose.inputs[0].producer()
    shape = None if reshape is None or reshape.op_type != "Reshape" else reshape.inputs[0].shape
    if shape is None or len(shape) != 3 or not only_user(reshape.inputs[0], "Reshape"):
        return False
    packed, bias = reshape.inputs[0].producer(), None
    if packed is not None and packed.op_type == "Add":
        bias = next((v for v in map(constant, packed.inputs) if v is not None), None)
        linear = next((v.producer() for v in packed.inputs if constant(v) is None), None)
        packed = linear if bias is not None and linear is not None and only_user(linear.outputs[0], "Add") else None
    weight = constant(packed.inputs[1]) if packed is not None and packed.op_type == "MatMul" else None
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[1:]):
        return False
    parts = [part_read(user) for user in transpose.outputs[0].consumers()]
    if (
        any(part is None for part in parts)
        or transpose.outputs[0].is_graph_output()
        or not only_user(reshape.outputs[0], "Transpose")
    ):
        return False
    x, name = packed.inputs[0], packed.inputs[1].name
    b, n, three, heads, d = (int(s) for s in reshape.outputs[0].shape)
    width = weight.shape[1] // three
    to = named(graph, f"{name}_shape", np.array([b, n, heads, d]))
    for part in parts:
        assert part is not None
        at, old = part
        columns = slice(at * width, (at + 1) * width)
        nodes = [
            ir.Node("", "MatMul", [x, named(graph, f"{name}_{'qkv'[at]}", np.ascontiguousarray(weight[:, columns]))])
        ]
        if bias is not None:
            nodes.append(
                ir.Node("", "Add", [nodes[-1].outputs[0], named(graph, f"{name}_{'qkv'[at]}_bias", bias[columns])])
            )
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], to]))
        nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", [0, 2, 1, 3])]))
        for made in nodes[: 1 + (bias is not None)]:
            made.outputs[0].shape = ir.Shape([b, n, width])
        nodes[-2].outputs[0].shape = ir.Shape([b, n, heads, d])
        replace(graph, old, nodes)
    return True


def part_read(user: ir.Node) -> tuple[int, ir.Value] | None:
    """(which of three, the value) for one Slice and Squeeze of a packed tensor."""
    if user.op_type != "Slice" or len(user.inputs) < 4 or not (squeeze := only_user(user.outputs[0], "Squeeze")):
        return None
    start, stop, axis = (constant(v) for v in user.inputs[1:4])
    if start is None or stop is None or axis is None or axis.tolist() != [0] or stop[0] - start[0] != 1 or start[0] > 2:
        return None
    return int(start[0]), squeeze.outputs[0]


def mean_first(graph: ir.Graph) -> int:
    """The mean over heads of a slice of tokens becomes a slice of the mean: less is copied."""
    count = 0
    for node in list(graph):
        axes = constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
        narrow = node.inputs[0].producer() if axes is not None and axes.tolist() == [1] else None
        if narrow is None or narrow.op_type != "Slice" or len(narrow.inputs) < 4 or node.attributes["keepdims"].value:
            continue
        at, source = constant(narrow.inputs[3]), narrow.inputs[0]
        if at is None or at.tolist() != [2] or source.shape is None or len(source.shape) != 4:
            continue
        mean = ir.Node("", "ReduceMean", [source, node.inputs[1]], list(node.attributes.values()))
        one = named(graph, f"{node.outputs[0].name}_axis", np.array([1]))
        replace(graph, node.outputs[0], [mean, ir.Node("", "Slice", [mean.outputs[0], *narrow.inputs[1:3], one])])
        count += 1
    return count


def reshape_once(graph: ir.Graph) -> int:
    """Of two reshapes in a row only the last one counts, and one to the shape that is there already does nothing."""
    count = 0
    for node in list(graph):
        shape = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        if shape is None or (shape == 0).any():
            continue
        before = node.inputs[0].producer()
        if before is not None and before.op_type == "Reshape":
            node.replace_input_with(0, before.inputs[0])
            count += 1
        source, out = node.inputs[0], node.outputs[0]
        if source.shape is not None and source.shape == out.shape and not out.is_graph_output():
            out.replace_all_uses_with(source)
            count += 1
    return count


def lp_norm(graph: ir.Graph) -> int:
    """x / max(|x|, tiny) over the last axis becomes LpNormalization, which gives 0 for 0 too."""
    count = 0
    for node in list(graph):
        clip = node.inputs[1].producer() if node.op_type == "Div" else None
        norm = clip.inputs[0].producer() if clip is not None and clip.op_type == "Clip" else None
        if norm is None or norm.op_type != "ReduceL2" or norm.inputs[0] is not node.inputs[0]:
            continue
        if node.outputs[0].dtype != ir.DataType.FLOAT:  # onnxruntime has no half precision kernel
            continue
        axes, least = constant(norm.inputs[1]), constant(clip.inputs[1])
        if (
            axes is None
            or axes.tolist() != [-1]
            or least is None
            or least > 1e-10
            or not norm.attributes["keepdims"].value
        ):
            continue
        made = ir.Node("", "LpNormalization", [node.inputs[0]], [ir.AttrInt64("axis", -1), ir.AttrInt64("p", 2)])
        replace(graph, node.outputs[0], [made])
        count += 1
    return count


RULES: Mapping[str, Callable[[ir.Graph], int]] = {
    "split_qkv": split_qkv,
    "mean_first": mean_first,
    "lp_norm": lp_norm,
    "reshape_once": reshape_once,
}


def simplify(model: ir.Model, rules: tuple[str, ...]) -> None:
    """Applies the named rules and drops what they leave unread."""
    if sum(RULES[rule](model.graph) for rule in rules):
        passes.RemoveUnusedNodesPass()(model)
