"""A free batch: the batch size that an exported graph holds as a number becomes one that is known at run time.

The graph was traced with a batch of at least two. Where that number stands in the shape of a Reshape or an Expand, or as
the first axis of a constant whose rows are all equal, the graph's own first input says it instead. What else may depend on
the batch cannot be seen in a graph, so the result counts only once it was run with several batch sizes and gave for every
sample what the static program gives (`check_batches`): a graph that does not is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor

from tokcompile.errors import ExportError
from tokcompile.exports.rewriting import constant, named

NAME = "batch"
SHAPES = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}  # which input is a shape
HINT = "\n  what to do: optimize once for each batch size, and write a file or an engine for each"


def free_batch(model: ir.Model, batch: int) -> None:
    """Rewrites a graph without functions. Raises: ExportError where no input has the batch as its first axis."""
    graph = model.graph
    free = [v for v in graph.inputs if leads(v, batch)]
    size = ir.Node("", "Shape", [free[0]], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)], name="tokcompile_batch")
    size.outputs[0].name = "tokcompile_batch"
    nodes = list(graph)
    graph.insert_before(nodes[0], [size])
    spread_constants(graph, nodes, batch, size.outputs[0])
    for node in nodes:
        slot = SHAPES.get(node.op_type) if node.domain == "" else None
        shape = None if slot is None else constant(node.inputs[slot])
        at = None if shape is None else place(shape.tolist(), batch, node.op_type == "Reshape")
        if slot is None or shape is None or at is None:
            continue
        if node.op_type == "Reshape" and -1 not in shape:
            values = [-1 if i == at else int(v) for i, v in enumerate(shape)]
            node.replace_input_with(1, named(graph, f"{node.outputs[0].name}_shape", np.array(values, np.int64)))
        else:
            node.replace_input_with(slot, shape_with(graph, node, shape.tolist(), at, size.outputs[0]))
    edges = [*free, *(v for v in graph.outputs if leads(v, batch))]
    for node in graph:
        for value in node.outputs:
            if value not in edges:
                value.shape = None  # it held the old number
    for value in edges:
        assert value.shape is not None
        value.shape = ir.Shape([NAME, *list(value.shape)[1:]])
    passes.RemoveUnusedNodesPass()(model)  # the constants that held the number: onnxruntime warns of each


def leads(value: ir.Value, batch: int) -> bool:
    return value.shape is not None and len(value.shape) > 0 and value.shape[0] == batch


def place(shape: Sequence[int], batch: int, multiples: bool) -> int | None:
    """Which axis of a shape is the batch: the first one if it can be, else the only one."""
    at = [i for i, v in enumerate(shape) if v == batch]
    if at and (at[0] == 0 or len(at) == 1):
        return at[0]
    return 0 if multiples and shape and shape[0] > 0 and shape[0] % batch == 0 else None


def shape_with(graph: ir.Graph, node: ir.Node, shape: Sequence[int], at: int, size: ir.Value) -> ir.Value:
    """The shape with the batch size at one place, computed at run time."""
    name = node.outputs[0].name
    ends = [(shape[:at], "before"), (shape[at + 1 :], "after")]
    before, after = ([named(graph, f"{name}_{end}", np.array(part, np.int64))] if part else [] for part, end in ends)
    joined = ir.Node("", "Concat", [*before, size, *after], [ir.AttrInt64("axis", 0)], name=f"{name}_shape")
    joined.outputs[0].name = f"{name}_shape_value"
    graph.insert_before(node, [joined])
    return joined.outputs[0]


def spread_constants(graph: ir.Graph, nodes: Sequence[ir.Node], batch: int, size: ir.Value) -> None:
    """A constant that holds the same rows once for every sample is expanded from one of them."""
    for name, value in list(graph.initializers.items()):
        data = constant(value)
        if data is None or data.ndim < 2 or data.shape[0] != batch or not value.consumers():
            continue
        if not (data == data[:1]).all():
            if data.dtype == np.int64:  # chosen positions
                raise ExportError(f"the batch of this model cannot be freed: {name} holds other indices for each sample{HINT}")
            continue
        one = named(graph, f"{name}_one", np.ascontiguousarray(data[:1]))
        first = next(node for node in nodes if value in node.inputs)
        spread = ir.Node("", "Expand", [one, size], name=f"{name}_spread")
        spread.outputs[0].name, spread.outputs[0].type = f"{name}_spread_value", value.type
        graph.insert_before(first, [spread])
        spread.replace_input_with(1, shape_with(graph, spread, [batch, *data.shape[1:]], 0, size))
        value.replace_all_uses_with(spread.outputs[0])


def check_example(names: Sequence[str], inputs: Sequence[Tensor]) -> int:
    """The batch size of the example inputs. Raises: ExportError where it cannot be told apart, or there is none."""
    sizes = {name: value.shape[0] if value.ndim else 1 for name, value in zip(names, inputs, strict=True)}
    if len(set(sizes.values())) != 1 or 1 in sizes.values():
        raise ExportError(
            f"a free batch needs example inputs that share a batch of 2 or more, and these have {sizes}: a 1 cannot be told "
            "from other ones in the graph\n  what to do: optimize with a batch of 2"
        )
    return next(iter(sizes.values()))


def check_batches(
    path: str, run_static: Any, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[str], tolerance: float
) -> dict[str, float]:
    """The largest relative error of each output over several batch sizes, sample by sample.

    run_static: inputs of the example's batch to outputs by name. Raises: ExportError where the file gives something else.
    """
    from tokcompile.exports.verify import first_line, run
    from tokcompile.passes.faithful import relative_error

    batch = len(inputs[0])
    errors, random = dict.fromkeys(outputs, 0.0), torch.Generator().manual_seed(0)
    for size in (1, batch + 1, 2 * batch + 1):
        many = [torch.cat([value.roll(i, 0) for i in range(-(-size // batch))])[:size] for value in inputs]
        noise = [0.1 * torch.randn(value.shape, generator=random).to(value.dtype) for value in many]
        many = [value + off if value.is_floating_point() else value for value, off in zip(many, noise)]
        try:
            got = dict(zip(outputs, run(path, names, many), strict=True))
        except Exception as error:
            raise ExportError(
                f"the batch of this model cannot be freed: at {size} it fails with {first_line(error)}{HINT}"
            ) from error
        for start in range(0, size, batch):
            part = [value[start : start + batch] for value in many]
            filled = [torch.cat([p, p[:1].expand(batch - len(p), *p.shape[1:])]) for p in part]
            for name, want in run_static(filled).items():
                found, rows = got[name], want[: len(part[0])]
                if found.shape[0] != size or found[start : start + batch].shape != rows.shape:
                    raise ExportError(
                        f"the batch of this model cannot be freed: output {name!r} is {tuple(found.shape)} at a batch of "
                        f"{size}{HINT}"
                    )
                errors[name] = max(errors[name], relative_error(found[start : start + batch], rows))
    for name, off in errors.items():
        if not off <= tolerance:
            raise ExportError(
                f"the batch of this model cannot be freed: output {name!r} is off by {off:.2e} of its largest value at other "
                f"batch sizes, more than the tolerance {tolerance:.0e}{HINT}"
            )
    return errors


def profile_shapes(profiles: Any, names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, list[list[int]]]:
    """(smallest, best, largest) shapes for every input, from three batch sizes or from {input: three shapes}.

    Raises: ExportError for what is neither, and for shapes that differ from the example's in more than the batch.
    """
    check_example(names, inputs)
    fixed = {name: list(value.shape[1:]) for name, value in zip(names, inputs, strict=True)}
    if isinstance(profiles, Mapping):
        if set(profiles) != set(fixed):
            raise ExportError(f"profiles is for the inputs {sorted(profiles)}, and the model has {sorted(fixed)}")
        shapes = {name: [list(shape) for shape in profiles[name]] for name in fixed}
    else:
        shapes = {name: [[size, *rest] for size in profiles] for name, rest in fixed.items()}
    for name, three in shapes.items():
        sizes = [shape[0] for shape in three]
        ordered = len(sizes) == 3 and all(isinstance(s, int) for s in sizes) and 1 <= sizes[0] <= sizes[1] <= sizes[2]
        if not ordered or any(shape[1:] != fixed[name] for shape in three):
            raise ExportError(
                f"the profile of {name!r} is {three}: it takes the smallest, best and largest shape, (batch, "
                f"{', '.join(map(str, fixed[name]))}) each\n  what to do: only the batch is free, as in profiles=(1, 4, 8); "
                "for another input size optimize once more"
            )
    return shapes
