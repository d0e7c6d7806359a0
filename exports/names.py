"""Names of outputs that a reader recognises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel


def output_names(opt: OptimizedModel) -> list[str]:
    """The keys of a model output that has them, else the names that torch.onnx gives the original's outputs."""
    exported = opt.output_names[: len(opt.output_names) - len(opt.extra_outputs)]
    pairs = zip_longest(named_leaves(opt._out_spec), exported)  # torch.compile knows no names
    return [key or name or f"output_{i}" for i, (key, name) in enumerate(pairs)]


def named_leaves(spec: pytree.TreeSpec, name: str = "") -> list[str]:
    """A name for each leaf, '' where no dictionary or model output names it; `hidden_states_0` inside a tuple."""
    if spec.is_leaf():
        return [name]
    keys = spec.context if isinstance(spec.context, (list, tuple)) else []
    if keys and isinstance(keys[-1], (list, tuple)):  # named tuples and some model outputs carry (type, keys)
        keys = keys[-1]
    if len(keys) != spec.num_children or not all(isinstance(k, str) for k in keys):
        keys = [str(i) if name else "" for i in range(spec.num_children)]
    out = []
    for i, key in enumerate(keys):
        out += named_leaves(spec.child(i), "_".join(filter(None, (name, key))))
    return out


def unique(names: list[str]) -> list[str]:
    """The same names, later ones numbered where they repeat."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out


def rename_outputs(model: Any, names: Sequence[str]) -> None:
    """Names the outputs of an onnx_ir model; an inner value that already has one of the names gives way."""
    import onnx_ir as ir

    graph = model.graph
    seen = set(graph.inputs) | set(graph.initializers.values())
    for i, value in enumerate(graph.outputs):
        if value in seen:  # an input, a constant or an earlier output once more
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].dtype = value.shape, value.dtype
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        seen.add(graph.outputs[i])
    inner = {v.name: v for node in graph for v in node.outputs}
    taken = {*inner, *graph.initializers, *(v.name for v in graph.inputs), *names}
    outputs = set(graph.outputs)
    for name in names:
        value = inner.get(name) or graph.initializers.get(name)
        if value is not None and value not in outputs:
            value.name = free(f"{name}_inner", taken)
    for i, value in enumerate(graph.outputs):  # in two steps: the names may be permuted
        value.name = free(f"tokcompile_output_{i}", taken)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def free(name: str, taken: set[str]) -> str:
    """The name, with underscores as needed, not taken yet; it is now."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
