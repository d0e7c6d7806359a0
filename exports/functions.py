"""Model-local functions: the plain-op meaning of each reduction node.

All reductions of a method share one function: their bodies are traced and compared, and where they differ only in
constants (shapes, counts, kept positions) these become attributes c0, c1, ... of the node. Bodies that differ in
their ops get op types `Tome_2`, `Tome_3`: the ONNX field `overload` would say it better, but TensorRT's parser looks
functions up by name alone and would run the wrong body. The plugin form has no functions, and all nodes of a method
have the name that `tokcompile.plugins.contract.op_type(method)` gives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from tokcompile.exports.flat import Reduction
from tokcompile.plugins import contract
from tokcompile.plugins.contract import DOMAIN
from tokcompile.plugins.torch_ops import DTYPES

Slot = tuple[int, int]  # (node, input) at which a body reads a constant


@dataclass
class BodyGraph:
    """One traced body in a form that two bodies can be compared by.

    ops: (domain, op_type, inputs as numbers, attributes, count of outputs). constants: what is read at which slot.
    outputs: numbers of the values that come out. Inputs of the body are 0, 1, ...; results follow; -1 is a constant
    and -2 an input left out.
    """

    ops: list[tuple[Any, ...]] = field(default_factory=list)
    attributes: list[Sequence[ir.Attr]] = field(default_factory=list)
    constants: dict[Slot, np.ndarray] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    opsets: dict[str, int] = field(default_factory=dict)

    def structure(self) -> tuple[Any, ...]:
        """Equal for two bodies that differ in constants only."""
        kinds = tuple((slot, str(value.dtype), value.ndim) for slot, value in self.constants.items())
        return tuple(self.ops), kinds, self.outputs


def take_bodies(model: ir.Model, reductions: Sequence[Reduction]) -> list[BodyGraph]:
    """The bodies that stand beside the model in its graph (see `Flat`); they are taken out of it."""
    graph = model.graph
    constants = {v: v.const_value.numpy() for v in graph.initializers.values() if v.const_value is not None}
    for node in graph:
        if node.op_type == "Constant" and node.domain == "":
            constants[node.outputs[0]] = ir.convenience.get_const_tensor(node.outputs[0]).numpy()  # type: ignore[union-attr]
    bodies = []
    for r in reversed(reductions):
        inputs = [graph.inputs.pop() for _ in r.node.inputs][::-1]
        outputs = [graph.outputs.pop() for _ in r.node.outputs][::-1]
        bodies.append(body_graph(model, inputs, outputs, constants))
    passes.RemoveUnusedNodesPass()(model)
    return bodies[::-1]


def body_graph(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], constants: dict[ir.Value, np.ndarray]
) -> BodyGraph:
    """The comparable form of what leads from these inputs to these outputs."""
    needed, todo = set(), [v.producer() for v in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v.producer() for v in node.inputs if v is not None and v not in constants]
    out = BodyGraph(opsets=dict(model.opset_imports))
    numbers: dict[ir.Value, int] = {value: i for i, value in enumerate(inputs)}

    def number(value: ir.Value | None, slot: Slot) -> int:
        if value in constants:
            out.constants[slot] = constants[value]
            return -1
        return -2 if value is None else numbers[value]

    for node in model.graph:
        if node not in needed or node.outputs[0] in constants:
            continue
        read = tuple(number(value, (len(out.ops), i)) for i, value in enumerate(node.inputs))
        attributes = tuple(sorted((a.name, str(a.type), str(a.value)) for a in node.attributes.values()))
        out.ops.append((node.domain, node.op_type, read, attributes, len(node.outputs)))
        out.attributes.append(list(node.attributes.values()))
        for value in node.outputs:
            numbers[value] = len(numbers)
    # where all even tokens merge, the kept ones are constant
    out.outputs = tuple(number(value, (len(out.ops), i)) for i, value in enumerate(outputs))
    return out


@dataclass
class Group:
    """The bodies that one function serves. lifted: the constants that differ, by attribute name, one per body."""

    op_type: str
    members: list[int]
    lifted: dict[str, list[np.ndarray]] = field(default_factory=dict)


def make_functions(reductions: Sequence[Reduction], graphs: Sequence[BodyGraph]) -> tuple[list[Group], list[ir.Function]]:
    """The functions of a model, and which reductions each one serves."""
    groups: dict[Any, Group] = {}
    taken: dict[str, int] = {}
    for i, (reduction, graph) in enumerate(zip(reductions, graphs, strict=True)):
        name = reduction.node.op_type
        if name in contract.PLUGINS and not is_fused(reduction):
            name += "Plain"  # under the plugin's name TensorRT would hand it to the plugin, which refuses it
        node = reduction.node
        key = repr((name, node.inputs, node.outputs, sorted(node.attributes), graph.structure()))
        if key not in groups:
            taken[name] = taken.get(name, 0) + 1
            groups[key] = Group(name if taken[name] == 1 else f"{name}_{taken[name]}", [])
        groups[key].members.append(i)
    functions = []
    for group in groups.values():
        members = [graphs[i] for i in group.members]
        functions.append(make_function(group, members, reductions[group.members[0]]))
    return list(groups.values()), functions


def make_function(group: Group, members: Sequence[BodyGraph], reduction: Reduction) -> ir.Function:
    """One function for these bodies; fills in `group.lifted`."""
    first = members[0]
    inputs = [ir.Value(name=name) for name in reduction.node.inputs]
    values: list[ir.Value] = list(inputs)
    constants: dict[Any, ir.Node] = {}
    nodes: list[ir.Node] = []

    def read(number: int, slot: Slot) -> ir.Value | None:
        if number != -1:
            return values[number] if number >= 0 else None
        made = constant(group, [m.constants[slot] for m in members], constants)
        if made not in nodes:
            nodes.append(made)
        return made.outputs[0]

    for i, (domain, op_type, numbers, _, count) in enumerate(first.ops):
        args = [read(number, (i, j)) for j, number in enumerate(numbers)]
        nodes.append(ir.Node(domain, op_type, args, first.attributes[i], num_outputs=count))
        values += nodes[-1].outputs
    outputs = [v for i, number in enumerate(first.outputs) if (v := read(number, (len(first.ops), i))) is not None]
    for i, value in enumerate(v for node in nodes for v in node.outputs):
        value.name = f"v{i}"
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=first.opsets, name=group.op_type)
    declared = [attribute(name, value) for name, value in reduction.node.attributes.items()]
    declared += [constant_attribute(name, value[0]) for name, value in group.lifted.items()]
    blank = [ir.Attr(a.name, a.type, None) for a in declared]
    return ir.Function(DOMAIN, group.op_type, graph=graph, attributes=blank)


def constant(group: Group, values: list[np.ndarray], made: dict[Any, ir.Node]) -> ir.Node:
    """The Constant node for a slot: its value if all bodies agree, else a reference to an attribute of the node."""
    key = tuple((str(v.dtype), v.shape, v.tobytes()) for v in values)
    if key in made:
        return made[key]
    if len(set(key)) == 1:
        attr = constant_attribute("", values[0])
    else:
        name = f"c{len(group.lifted)}"
        group.lifted[name] = values
        attr = ir.RefAttr(constant_attribute("", values[0]).name, name, constant_attribute("", values[0]).type)
    made[key] = ir.Node("", "Constant", [], [attr])
    return made[key]


def constant_attribute(name: str, value: np.ndarray) -> ir.Attr:
    """A constant as an attribute, named as Constant wants it where no name is given.

    Lists of integers are tensors: onnxruntime 1.23, the last one for Python 3.10, infers no shapes from `value_ints`.
    """
    if value.dtype == np.int64 and value.ndim == 0:
        return ir.AttrInt64(name or "value_int", int(value))
    if value.dtype == np.float32 and value.ndim == 0:
        return ir.AttrFloat32(name or "value_float", float(value))
    return ir.AttrTensor(name or "value", ir.tensor(value))


def attribute(name: str, value: Any) -> ir.Attr:
    """A node attribute from a Python value."""
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    return ir.AttrString(name, value) if isinstance(value, str) else ir.AttrInt64s(name, list(value))


def attach(model: ir.Model, reductions: Sequence[Reduction]) -> dict[str, int]:
    """Gives every reduction node its op type and attributes, and the model their functions: {op_type: nodes}."""
    groups, functions = make_functions(reductions, take_bodies(model, reductions))
    place = {i: (group, at) for group in groups for at, i in enumerate(group.members)}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        number = node.attributes["number"].as_int()
        group, at = place[number]
        node.op_type, node.name = group.op_type, f"reduction_{number}"
        for output, name in zip(node.outputs, reductions[number].node.outputs, strict=True):
            output.name = f"reduction_{number}_{name}"  # by which the layers of an engine are found again
        node.attributes.clear()
        for name, value in reductions[number].node.attributes.items():
            node.attributes.add(attribute(name, value))
        for name, values in group.lifted.items():
            node.attributes.add(constant_attribute(name, values[at]))
    for function in functions:
        model.functions[function.identifier()] = function
        for domain, version in function.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
    return {group.op_type: len(group.members) for group in groups}


def describe(model: ir.Model, reductions: Sequence[Reduction]) -> list[dict[str, Any]]:
    """For each reduction its node, the name and shape of its result in the file, and whether there is a plugin for it."""
    found = {node.name: node for node in model.graph if node.domain == DOMAIN}
    out = []
    for i, reduction in enumerate(reductions):
        module, site, node = reduction.module, reduction.module.site, found[f"reduction_{i}"]
        shape = node.outputs[0].shape
        assert shape is not None
        out.append(
            {"node": node.name, "method": module.recipe.name, "block": module.block, "n": site.n, "k": site.k,
             "tensor": node.outputs[0].name, "shape": list(shape.numpy()), "fused": is_fused(reduction)}
        )  # fmt: skip
    return out


def is_fused(reduction: Reduction) -> bool:
    """Whether a plugin stands for it: one of our kernels does what its recipe does, in a dtype that the kernel takes."""
    module = reduction.module
    sizes = "size" in reduction.node.inputs and not module.recipe.track_size  # tracked by an earlier method
    return module.kernel is not None and not sizes and reduction.outputs[0].dtype in DTYPES


def to_plain(model: ir.Model) -> None:
    """Writes the body of every function where it is called."""
    if model.functions:
        passes.InlinePass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.DeduplicateInitializersPass()(model)
        passes.RemoveUnusedNodesPass()(model)  # as indices that no later node reads, of which onnxruntime would warn
        passes.RemoveUnusedOpsetsPass()(model)


def to_plugin(model: ir.Model, fused: Collection[str]) -> dict[str, int]:
    """Leaves the nodes of these names without functions, all others as plain ops: {op_type: nodes}."""
    nodes = [node for node in model.graph if node.name in fused]
    for node in nodes:
        node.op_type = contract.op_type(node.attributes["method"].as_string())
        for name in [name for name in node.attributes if re.fullmatch(r"c\d+", name)]:
            del node.attributes[name]  # only the function's body read them
    called = {node.op_identifier() for node in model.graph if node not in nodes}
    for key in [key for key in model.functions if key not in called]:
        del model.functions[key]
    to_plain(model)
    names = [node.op_type for node in nodes]
    return {name: names.count(name) for name in names}
