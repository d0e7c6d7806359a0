"""Checking a written file: forbidden ops, and its numbers in onnxruntime against the torch module."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import ExportError
from tokcompile.exports.targets import Target
from tokcompile.passes.faithful import relative_error

# largest difference to the torch module, as a share of the largest value of the output
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


PADDING = "rows of attention that a mask of -inf hides as a whole (padding) differ in any case"
TIES = f"near ties between tokens fall either way under other rounding, so try other example inputs; {PADDING}"
OTHERWISE = f"torch.onnx or onnxruntime computes this model otherwise; {PADDING}"
NO_KERNEL = (
    "\n  what to do: some of the model computes in a dtype for which onnxruntime lacks this op on the CPU, such as bfloat16: "
    "convert it to float32 or float16 before optimizing; or verify=False, which writes the file for another runtime"
)


@dataclass
class Check:
    """errors: the relative error of each output. note: why nothing was compared, where nothing was."""

    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    note: str = ""


def all_nodes(model: Any) -> Iterator[Any]:
    """Every node of an onnx_ir model, those of functions and subgraphs too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def refuse_forbidden(model: Any, target: Target, fused: Collection[str] = ()) -> None:
    """Raises: ExportError that names the first node which the target does not take.

    fused: the names of nodes that a plugin stands for, whose functions do not count.
    """
    called = {n.op_identifier() for n in model.graph.all_nodes() if n.name not in fused}
    functions = [f for key, f in model.functions.items() if key in called]
    for node in [*model.graph.all_nodes(), *(n for f in functions for n in f.all_nodes())]:
        if node.domain not in ("", "ai.onnx"):
            continue
        how = node.attributes.get("reduction")
        forms = {node.op_type, f"{node.op_type}:{how.value}" if how is not None else ""}
        for op in sorted(forms & target.forbidden):
            raise ExportError(
                f"node {node.name!r} is {op.replace(':', ' with reduction ')}, which {target.name} does not take\n"
                "  what to do: use another target, or another method if the node belongs to a reduction"
            )
    if target.top_k is not None:
        for node, k in top_ks(model):
            if k > target.top_k and node.name not in fused:
                raise ExportError(
                    f"node {node.name or node.op_type!r} selects the top {k} tokens, but {target.name} stops at "
                    f"{target.top_k}\n  what to do: form='plugin', whose kernels have no such limit, if the node belongs to "
                    "a reduction; or a smaller budget, a method that ranks fewer tokens at once (random, grid), or fewer "
                    "tokens going in"
                )


def top_ks(model: Any) -> Iterator[tuple[Any, int]]:
    """Every TopK that runs, and its K: constant in the graph, or an attribute that the calling node sets."""
    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        for inner in [node] if function is None else function.all_nodes():
            if inner.op_type != "TopK" or inner.domain not in ("", "ai.onnx"):
                continue
            k = inner.inputs[1]
            maker = k.producer()
            if maker is not None and maker.op_type == "Constant":
                attr = next(iter(maker.attributes.values()))
                attr = node.attributes[attr.ref_attr_name] if attr.is_ref() else attr
                value = attr.value.numpy() if hasattr(attr.value, "numpy") else attr.value
            elif k.const_value is not None:
                value = k.const_value.numpy()
            else:
                continue
            yield (node if function is not None else inner), int(torch.as_tensor(value).max())


def run(path: str, names: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Runs a file in onnxruntime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    feeds = {name: to_ort(value) for name, value in zip(names, inputs, strict=True) if name in taken}
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return [from_ort(value) for value in binding.get_outputs()]


def to_ort(value: Tensor) -> Any:
    import onnxruntime as ort

    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:  # numpy has no such type
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(torch.uint16).numpy(), 16)
    return ort.OrtValue.ortvalue_from_numpy(value.numpy())


def from_ort(value: Any) -> Tensor:
    if value.element_type() == 16:
        return torch.from_numpy(value.numpy().copy()).view(torch.bfloat16)
    return torch.from_numpy(value.numpy().copy())


def compare(
    path: str,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    expected: dict[str, Tensor],
    tolerance: float | None,
    half: str | None = None,
    reduced: bool = True,
) -> Check:
    """The errors of a file's outputs; `half` is the precision inside, if it differs from that of the inputs. reduced: whether
    a choice of tokens may differ.

    Raises: ExportError where one is out of tolerance.
    """
    floats = [v.dtype for v in [*inputs, *expected.values()] if v.is_floating_point()]
    check = Check(tolerance=max((TOLERANCES[d] for d in floats), default=0.0) if tolerance is None else tolerance)
    try:
        got = run(path, names, inputs)
    except Exception as error:
        if torch.bfloat16 in floats or half == "bf16":
            check.note = f"not run: onnxruntime on the CPU lacks a bfloat16 kernel ({first_line(error)})"
            return check
        way_out = NO_KERNEL if "NOT_IMPLEMENTED" in str(error) else ""
        raise ExportError(f"onnxruntime does not run the exported model: {first_line(error)}{way_out}") from error
    for (name, want), value in zip(expected.items(), got, strict=True):
        if tuple(value.shape) != tuple(want.shape) or value.dtype != want.dtype:
            raise ExportError(
                f"verification failed: output {name!r} is {tuple(value.shape)} {value.dtype}, and "
                f"{tuple(want.shape)} {want.dtype} in torch"
            )
        check.errors[name] = relative_error(value, want)
    hint = TIES if reduced else OTHERWISE
    for name, off in check.errors.items():
        if not off <= check.tolerance:
            raise ExportError(
                f"verification failed: output {name!r} is off by {off:.2e} of its largest value, more than the "
                f"tolerance {check.tolerance:.0e}\n  what to do: {hint}; pass tolerance=... to accept it, or "
                "verify=False to look at it"
            )
    return check


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
