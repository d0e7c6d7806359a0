"""ONNX: one node per reduction, its meaning in plain ops beside it; checked in onnxruntime before it gets its name."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from tokcompile.errors import ExportError
from tokcompile.exports.targets import Target, check_opset, get_target
from tokcompile.files import atomic
from tokcompile.primitives.forms import use_forms

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel
    from tokcompile.exports.flat import Flat

LARGEST_FILE = 2**31 - 2**24  # protobuf ends at 2 GiB; the rest is for the graph


@dataclass
class ExportReport:
    """What was written and how it was checked.

    nodes: how many nodes each reduction op has. errors: relative error of each output in onnxruntime, empty where
    nothing was compared, which `note` explains.
    """

    path: str
    target: str
    opset: int
    inline: bool
    bytes: int = 0
    external_data: str | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    note: str = ""
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """The largest relative error, or None where nothing was compared."""
        return max(self.errors.values(), default=None)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        reductions = ", ".join(f"{count} {name}" for name, count in self.nodes.items()) or "no reductions"
        checked = f"relative error {self.error:.1e} in onnxruntime" if self.errors else self.note or "not verified"
        return f"{self.path}: {self.bytes / 1e6:.1f} MB, opset {self.opset}, {reductions}; {checked}"


def export_onnx(
    opt: OptimizedModel,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    inline: bool = False,
    opset: int | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Writes an optimized model as ONNX, runs it in onnxruntime against torch, and only then gives it its name.

    target: "onnxruntime", "tensorrt" (10.7 and later), "tensorrt_rtx" or "jetpack6". inline: whether reductions are
    written as plain ops instead of one node each with a function. tolerance: of the relative error, 1e-4 in float32 and
    2e-2 in float16 by default. external_data: whether weights go to `path` + ".data"; by default if they must (2 GB).

    Raises: ExportError, and leaves no file behind then.
    """
    start = time.perf_counter()
    require_onnx()
    row = get_target(target)
    opset = check_opset(opset, row)
    inline = inline or not row.functions
    report = ExportReport(os.fspath(path), target, opset, inline)
    with atomic(path) as temporary, quiet():
        from tokcompile.exports.flat import flatten

        flat = flatten(opt)
        model = build(flat, row, opset, inline, report)
        set_metadata(model, opt, row)
        finish(opt, flat, model, row, verify, tolerance, external_data, temporary, report)
    report.seconds = time.perf_counter() - start
    return report


def require_onnx() -> None:
    """Raises: ExportError where the packages that export needs are missing."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise ExportError(f'ONNX export needs {name}: pip install "tokcompile[onnx]" ({error})') from error


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx reports on every step; what matters is raised or stands in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def build(flat: Flat, target: Target, opset: int, inline: bool, report: ExportReport) -> Any:
    """The model as onnx_ir, with one node and a function, or plain ops, for each reduction."""
    import onnx_ir.passes.common as passes

    from tokcompile.exports.functions import attach
    from tokcompile.exports.names import rename_outputs
    from tokcompile.exports.simplify import simplify

    bodies = [torch.zeros(v.shape, dtype=v.dtype) for r in flat.reductions for v in r.inputs]
    forms = target.forms
    if any(r.outputs[0].dtype.itemsize < 4 for r in flat.reductions):
        forms = replace(forms, merge="onehot")  # onnxruntime adds while scattering in float32 only
    with use_forms(forms):
        model = to_onnx(flat.gm, [*flat.inputs, *bodies], opset)
    simplify(model, target.rules)
    if flat.reductions:
        report.nodes = attach(model, flat.reductions)
    rename_outputs(model, flat.output_names)
    report.inputs = [v.name for v in model.graph.inputs]
    report.outputs = [v.name for v in model.graph.outputs]
    if inline and flat.reductions:
        passes.InlinePass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.DeduplicateInitializersPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    return model


def to_onnx(module: GraphModule, inputs: Sequence[Any], opset: int) -> Any:
    """torch.onnx.export to onnx_ir. Raises: ExportError with the op that has no ONNX form."""
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module, tuple(inputs), dynamo=True, opset_version=opset, input_names=names, verbose=False
            )
    except Exception as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise ExportError(f"torch.onnx cannot write this model: {' '.join(lines[:3])}") from error
    assert program is not None
    return program.model


def set_metadata(model: Any, opt: OptimizedModel, target: Target) -> None:
    """Says in the file what it is and how it was made, so that it can be made again."""
    import onnx

    import tokcompile

    plan = json.loads(opt.plan.json())
    model.producer_name, model.producer_version = "tokcompile", tokcompile.__version__
    model.metadata_props.update(
        {
            "tokcompile.method": opt.plan.method,
            "tokcompile.budget": json.dumps(plan.get("budget")),
            "tokcompile.plan": json.dumps(plan),
            "tokcompile.version": tokcompile.__version__,
            "tokcompile.target": target.name,
            "torch.version": torch.__version__,
            "onnx.version": onnx.__version__,
        }
    )


def finish(
    opt: OptimizedModel, flat: Flat, model: Any, target: Target, verify: bool, tolerance: float | None,
    external: bool | None, temporary: str, report: ExportReport,
) -> None:  # fmt: skip
    """Checks the model, writes it beside its final place, and runs it there."""
    import onnx

    from tokcompile.exports.verify import compare, refuse_forbidden

    refuse_forbidden(model, target)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = size > LARGEST_FILE if external is None else external
    if size > LARGEST_FILE and not external:
        raise ExportError(f"the weights take {size / 1e9:.1f} GB, and one ONNX file holds 2 GB: pass external_data=True")
    with ExitStack() as stack:
        file = write(model, temporary, report, stack if external else None)
        try:
            onnx.checker.check_model(file, full_check=True)
        except Exception as error:
            raise ExportError(f"onnx.checker refuses the exported model: {error}") from error
        if verify:
            with torch.no_grad():
                values = opt.graph_module(*opt.example_inputs)
            expected = {name: values[i] for name, i in zip(flat.output_names, flat.kept_outputs, strict=True)}
            check = compare(file, flat.input_names, flat.inputs, expected, tolerance)
            report.errors, report.tolerance, report.note = check.errors, check.tolerance, check.note
        report.bytes = os.path.getsize(file)
        if external:
            data = os.path.join(os.path.dirname(file), os.path.basename(report.path) + ".data")
            report.bytes += os.path.getsize(data)
            os.replace(data, stack.enter_context(atomic(report.external_data or "")))
            os.replace(file, temporary)


def write(model: Any, temporary: str, report: ExportReport, stack: ExitStack | None) -> str:
    """Writes to `temporary`, or, with weights aside, to a folder in which the weights have their final name."""
    import onnx_ir as ir

    if stack is None:
        ir.save(model, temporary)
        return temporary
    report.external_data = report.path + ".data"
    name = os.path.basename(report.path)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}.", dir=os.path.dirname(temporary)))
    ir.save(model, os.path.join(folder, name), external_data=f"{name}.data")
    return os.path.join(folder, name)
