"""ONNX: one node per reduction, its meaning in plain ops beside it; checked in onnxruntime before it gets its name."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from tokcompile.errors import ExportError
from tokcompile.exports.program import exported
from tokcompile.exports.targets import BOTH, PLAIN, PLUGIN, Target, check_opset, file_form, get_target
from tokcompile.files import atomic
from tokcompile.passes.trace import quiet
from tokcompile.primitives.forms import use_forms
from tokcompile.replaced import replaced

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel
    from tokcompile.exports.flat import Flat

LARGEST_FILE = 2**31 - 2**24  # protobuf ends at 2 GiB; the rest is for the graph


@dataclass
class ExportReport:
    """What was written and how it was checked.

    form: how reductions stand in the file. files: all that were written, by form. nodes: how many nodes each reduction op
    has. reductions: for each one its node, its result's name and shape, and whether a plugin stands for it in the plugin
    form. errors: relative error of each output in onnxruntime, empty where nothing was compared, which `note` explains.
    """

    path: str
    target: str
    opset: int
    form: str
    precision: str | None = None
    dynamic_batch: bool = False
    files: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    external_data: str | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    reductions: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    note: str = ""
    seconds: float = 0.0

    @property
    def inline(self) -> bool:
        """Whether reductions are written as plain ops."""
        return self.form == PLAIN

    @property
    def error(self) -> float | None:
        """The largest relative error, or None where nothing was compared."""
        return max(self.errors.values(), default=None)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        reductions = ", ".join(f"{count} {name}" for name, count in self.nodes.items()) or "no reductions"
        checked = f"relative error {self.error:.1e} in onnxruntime" if self.errors else self.note or "not verified"
        paths = ", ".join(self.files.values())
        return f"{paths}: {self.bytes / 1e6:.1f} MB, opset {self.opset}, {reductions}; {checked}"


def export_onnx(
    opt: OptimizedModel,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    inline: bool = False,
    form: str | None = None,
    precision: str | None = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Writes an optimized model as ONNX, runs it in onnxruntime against torch, and only then gives it its name.

    target: "onnxruntime", "tensorrt" (10.7 and later), "tensorrt_10", "tensorrt_11", "tensorrt_rtx", "jetpack6" or
    "jetpack7". form: how reductions are written: "functions" (one node each with a function), "plain" (plain ops; the
    same as inline=True), "plugin" (one node each for the plugin, without its function: only TensorRT reads it) or "both"
    (`m.plain.onnx` and `m.plugin.onnx` for `m.onnx`; the default for TensorRT before 10.7, which jetpack6 has).
    precision: "fp16" or "bf16" converts the program first, see `exports/precision.py`. dynamic_batch: leaves the batch free,
    for inputs that share a batch of at least 2 here; needs form "plain" or "plugin". tolerance: of the relative error,
    1e-4 in float32 and 2e-2 in float16 by default. external_data: whether weights go to `path` + ".data"; by default if
    they must (2 GB).

    Raises: ExportError, and leaves no file behind then.
    """
    start = time.perf_counter()
    require_onnx()
    row = get_target(target)
    opset = check_opset(opset, row)
    path = os.fspath(path)
    files = file_names(path, file_form(form or form_of_name(path, row), inline, row))
    if dynamic_batch and "functions" in files:
        raise ExportError("dynamic_batch=True needs form='plain' or form='plugin': functions hold the batch in their constants")
    opt.folded.check()
    if frozen := opt.frozen:
        raise ExportError(
            f"tracing has fixed values that the model computes, and a file would take them for every input: {frozen[0]}\n"
            "  what to do: load a mixture of experts of transformers with experts_implementation='batched_mm'"
        )
    report = ExportReport(next(iter(files.values())), row.name, opset, next(iter(files)), precision, dynamic_batch, files)
    with ExitStack() as stack:
        temporary = {form: stack.enter_context(atomic(name)) for form, name in files.items()}
        stack.enter_context(quiet())
        from tokcompile.exports.batch import check_example
        from tokcompile.exports.flat import flatten
        from tokcompile.exports.host import on_cpu
        from tokcompile.exports.precision import convert, default_tolerance

        opt = on_cpu(convert(opt, precision))
        flat = flatten(opt)
        if dynamic_batch:
            check_example(flat.input_names, flat.inputs)
        model = build(flat, row, opset, report)
        set_metadata(model, opt, row)
        job = Job(opt, flat, row, default_tolerance(precision) if tolerance is None else tolerance, external_data, report)
        for form, name in temporary.items():
            last = form == list(temporary)[-1]
            finish(job, model if last else model.clone(), form, name, verify and not report.errors and not report.note)
    report.seconds = time.perf_counter() - start
    return report


def file_names(path: str, form: str) -> dict[str, str]:
    """The file of each form that is written."""
    if form != BOTH:
        return {form: path}
    stem, suffix = os.path.splitext(path)
    return {form: f"{stem}.{form}{suffix}" for form in (PLAIN, PLUGIN)}


def form_of_name(path: str, target: Target) -> str | None:
    """Of a target that takes two files, the one that such a name is for."""
    if target.file != BOTH:
        return None
    return next((form for form in (PLAIN, PLUGIN) if path.endswith(f".{form}.onnx")), None)


def require_onnx() -> None:
    """Raises: ExportError where the packages that export needs are missing."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise ExportError(f'ONNX export needs {name}: pip install "tokcompile[onnx]" ({error})') from error


def build(flat: Flat, target: Target, opset: int, report: ExportReport) -> Any:
    """The model as onnx_ir, with one node and a function for each reduction."""
    import onnx_ir.passes.common as passes

    from tokcompile.exports.flat_calls import flat_calls
    from tokcompile.exports.functions import attach, describe
    from tokcompile.exports.names import rename_outputs
    from tokcompile.exports.simplify import simplify

    bodies = [torch.zeros(v.shape, dtype=v.dtype) for r in flat.reductions for v in r.inputs]
    forms = replace(target.forms, gather="elements", merge="onehot") if report.dynamic_batch else target.forms
    if any(r.outputs[0].dtype.itemsize < 4 for r in flat.reductions):
        forms = replace(forms, merge="onehot")  # onnxruntime adds while scattering in float32 only
    with use_forms(forms):
        model = to_onnx(flat.gm, [*flat.inputs, *bodies], opset)
    if PLUGIN not in report.files and "drop_batch" in target.rules:  # the plugin is given its batch
        flat_calls(model, flat.reductions)
    simplify(model, target.rules)
    if flat.reductions:
        report.nodes = attach(model, flat.reductions)
    rename_outputs(model, flat.output_names)
    report.inputs = [v.name for v in model.graph.inputs]
    report.outputs = [v.name for v in model.graph.outputs]
    report.reductions = describe(model, flat.reductions)
    passes.ClearMetadataAndDocStringPass()(model)
    return model


EXPERTS = (
    "\n  what to do: ONNX has no product of rows with the weights of one expert each; load the model with "
    "experts_implementation='batched_mm' (transformers), which copies the weights for each token"
)


def to_onnx(module: GraphModule, inputs: Sequence[Any], opset: int) -> Any:
    """torch.onnx.export to onnx_ir. Raises: ExportError with the op that has no ONNX form."""
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    try:
        with torch.no_grad(), linear_rules():
            program = torch.onnx.export(
                exported(module, inputs), dynamo=True, opset_version=opset, input_names=names, verbose=False
            )
    except ExportError:
        raise
    except Exception as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        said = " ".join(lines[:3])
        way_out = EXPERTS if "grouped_mm" in said else ""
        raise ExportError(f"torch.onnx cannot write this model: {said}{way_out}") from error
    assert program is not None
    return program.model


def linear_rules() -> AbstractContextManager[None]:
    """Leaves out the one rule of onnxscript's optimizer that compares every Slice with every other node of the graph (it joins
    two halves to a Split, which torch writes anyway): with it a graph of 7,000 nodes takes minutes."""
    from onnxscript import rewriter

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    kept = tuple(rule for rule in rules if getattr(rule, "name", None) != "SlicesSplit")
    return replaced(rewriter, _DEFAULT_REWRITE_RULES=kept) if kept else nullcontext()  # another release has them elsewhere


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


@dataclass(frozen=True)
class Job:
    """What is the same for all files of an export. external: whether weights go to a file of their own, None if they must."""

    opt: OptimizedModel
    flat: Flat
    target: Target
    tolerance: float | None
    external: bool | None
    report: ExportReport


def finish(job: Job, model: Any, form: str, temporary: str, verify: bool) -> None:
    """Gives the model its form, checks it, writes it beside its final place, and runs it there."""
    from tokcompile.exports.batch import check_example, free_batch
    from tokcompile.exports.functions import to_plain, to_plugin
    from tokcompile.exports.verify import refuse_forbidden

    report, path = job.report, job.report.files[form]
    fused = [r["node"] for r in report.reductions if r["fused"]] if form == PLUGIN else []
    refuse_forbidden(model, job.target, fused)
    external = in_two_files(model, job.external)
    batch = check_example(job.flat.input_names, job.flat.inputs) if report.dynamic_batch else 0
    with ExitStack() as stack:
        if form == PLUGIN:
            if verify:  # onnxruntime has no such plugin: what runs there is the same graph with the functions
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".tokcompile.", dir=os.path.dirname(temporary)))
                file = os.path.join(folder, "functions.onnx")
                copy = model.clone()
                if report.dynamic_batch:
                    to_plain(copy)
                    free_batch(copy, batch)
                save(copy, file, external)
                run_it(job, file)
            report.nodes = to_plugin(model, fused)
        elif form == PLAIN:
            to_plain(model)
        if report.dynamic_batch:
            free_batch(model, batch)
        file = write(model, temporary, path, stack) if external else save(model, temporary, False)
        check_file(file, report.opset, job.target)
        if verify and form != PLUGIN:
            run_it(job, file)
        report.bytes += os.path.getsize(file)
        if external:
            report.external_data = report.external_data or f"{path}.data"
            data = os.path.join(os.path.dirname(file), os.path.basename(path) + ".data")
            report.bytes += os.path.getsize(data)
            os.replace(data, stack.enter_context(atomic(f"{path}.data")))
            os.replace(file, temporary)


def in_two_files(model: Any, asked: bool | None) -> bool:
    """Whether weights go to a file of their own. Raises: ExportError where they have to, and may not."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = size > LARGEST_FILE if asked is None else asked
    if size > LARGEST_FILE and not external:
        raise ExportError(f"the weights take {size / 1e9:.1f} GB, and one ONNX file holds 2 GB: pass external_data=True")
    return external


def check_file(file: str, opset: int, target: Target) -> None:
    """Raises: ExportError for what is no ONNX."""
    import onnx

    try:
        onnx.checker.check_model(file, full_check=True)
    except Exception as error:
        newer = "bfloat16" in str(error) and opset < target.newest_opset
        hint = f"\n  what to do: opset={target.newest_opset}, in which more ops take bfloat16" if newer else ""
        raise ExportError(f"onnx.checker refuses the exported model: {error}{hint}") from error


def run_it(job: Job, file: str) -> None:
    """Compares the file in onnxruntime with torch. Raises: ExportError where they differ."""
    from tokcompile.exports.batch import check_batches
    from tokcompile.exports.verify import compare

    opt, flat, report = job.opt, job.flat, job.report

    def in_torch(inputs: Sequence[Any]) -> dict[str, Any]:
        given = iter(inputs)
        with torch.no_grad():
            values = opt.graph_module(*(next(given) if isinstance(v, torch.Tensor) else v for v in opt.example_inputs))
        return {name: values[i] for name, i in zip(flat.output_names, flat.kept_outputs, strict=True)}

    wanted, reduced = in_torch(flat.inputs), bool(flat.reductions)
    check = compare(file, flat.input_names, flat.inputs, wanted, job.tolerance, half=report.precision, reduced=reduced)
    report.errors, report.tolerance, report.note = check.errors, check.tolerance, check.note
    if report.dynamic_batch and check.note:
        raise ExportError(
            f"a free batch counts only once it was run, and this model was {check.note}\n  what to do: fp16 or float32; or "
            "verify=False, after one of these was exported with dynamic_batch=True"
        )
    if report.dynamic_batch:
        others = check_batches(file, in_torch, flat.input_names, flat.inputs, list(check.errors), check.tolerance)
        report.errors = {name: max(off, others[name]) for name, off in check.errors.items()}


def save(model: Any, path: str, external: bool) -> str:
    import onnx_ir as ir

    for value in model.graph.initializers.values():  # their data say what they are: onnxruntime's quantizers transpose weights
        value.type = value.shape = None  # and then refuse the shape that stands beside
        value.metadata_props.clear()
    ir.save(model, path, external_data=f"{os.path.basename(path)}.data" if external else None)
    return path


def write(model: Any, temporary: str, path: str, stack: ExitStack) -> str:
    """Writes to a folder beside `temporary`, in which the file and its weights have their final names."""
    name = os.path.basename(path)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}.", dir=os.path.dirname(temporary)))
    return save(model, os.path.join(folder, name), True)
