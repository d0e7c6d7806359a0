"""Engines: from an optimized model to a file that TensorRT or TensorRT-RTX runs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tokcompile.errors import EngineError
from tokcompile.exports.targets import PLAIN, PLUGIN, get_target
from tokcompile.files import atomic

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel

BACKENDS = ("tensorrt", "tensorrt_rtx")


@dataclass
class EngineReport:
    """What was built and what the parsed network holds.

    layers, plugin_layers: of the network, before the builder fuses it; None where trtexec did not say. tokens: block,
    n, k and the sequence length seen after each reduction. seconds: of the build alone. total_seconds: with the export.
    onnx_error: relative error of the exported program in onnxruntime. note: what could not be checked.
    """

    path: str
    backend: str
    version: str
    target: str
    form: str
    precision: str | None
    compute_capabilities: list[str]
    bytes: int
    seconds: float
    total_seconds: float = 0.0
    layers: int | None = None
    plugin_layers: int | None = None
    plugin_library: str | None = None
    profiles: dict[str, Any] = field(default_factory=dict)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    onnx_error: float | None = None
    warnings: list[str] = field(default_factory=list)
    note: str = ""

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        devices = f" for {', '.join(self.compute_capabilities)}" if self.compute_capabilities else ""
        layers = "layers unknown" if self.layers is None else f"{self.layers} layers, {self.plugin_layers} of them plugins"
        counts = ", ".join(f"{t['n']} -> {t['k']}" for t in self.tokens)
        parts = [layers, counts and f"tokens {counts}", f"built in {self.seconds:.1f} s", self.note]
        what = f"{self.path}: {self.backend} {self.version}{devices}, {self.bytes / 1e6:.1f} MB"
        return "; ".join(filter(None, [what, *parts]))


def build_engine(
    opt: OptimizedModel,
    path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt",
    target: str | None = None,
    precision: str | None = None,
    plugins: bool | None = None,
    plugin_library: str | os.PathLike[str] | None = None,
    compute_capabilities: Sequence[str] | None = None,
    profiles: Sequence[int] | Mapping[str, Sequence[Sequence[int]]] | None = None,
    verify: bool = True,
    tolerance: float | None = None,
) -> EngineReport:
    """Builds an engine and gives it its name once the parsed network is what the plan says.

    backend: "tensorrt" (for the GPU of this machine, through the Python package or trtexec) or "tensorrt_rtx" (ahead of
    time, no GPU needed, for `compute_capabilities`). target: a name from `exports/targets.py`, by default the backend's.
    precision: None as the model is, "fp32", "fp16" or "bf16". plugins: whether each reduction is one plugin layer, by
    default if a `plugin_library` is given; without one it is built for this machine. verify, tolerance: of the exported
    program in onnxruntime. profiles: the smallest, best and largest batch, or {input: (smallest, best, largest shape)},
    for a model optimized with a batch of at least 2; by default the engine takes the batch of the example alone.

    Raises: EngineError, ExportError; nothing is left behind then.
    """
    start = time.perf_counter()
    check_options(backend, compute_capabilities)
    target = get_target(target or backend).name
    plugins = plugin_library is not None if plugins is None else plugins
    library = library_for(target, plugin_library) if plugins else None
    form = PLUGIN if plugins else PLAIN
    shapes = shapes_of(opt, profiles) if profiles else {}
    with atomic(path) as temporary, tempfile.TemporaryDirectory(prefix="tokcompile-") as folder:
        exported = opt.export_onnx(
            os.path.join(folder, "model.onnx"), target=target, form=form, precision=precision, dynamic_batch=bool(shapes),
            verify=verify, tolerance=tolerance,
        )  # fmt: skip
        spec = {"onnx": exported.path, "engine": temporary, "plugins": [library] if library else [], "profiles": shapes}
        result, chosen = run_backend(backend, spec, target, compute_capabilities)
        report = EngineReport(
            os.fspath(path), backend, result["version"], target, form, precision, chosen, result["bytes"], result["seconds"]
        )
        report.profiles = shapes
        look_at(result, exported, plugins, report)
    report.plugin_library, report.total_seconds = library, time.perf_counter() - start
    return report


def check_options(backend: str, capabilities: Any) -> None:
    """Raises: EngineError for what does not go together, before any work is done."""
    if backend not in BACKENDS:
        raise EngineError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    if capabilities is not None and backend == "tensorrt":
        raise EngineError(
            "compute_capabilities is for tensorrt_rtx: TensorRT builds for the GPU that it runs on\n"
            "  what to do: leave it out, and build on the machine that the engine is for"
        )
    if capabilities is not None:
        from tokcompile.exports.tensorrt_rtx import check_capabilities

        check_capabilities(capabilities)


def shapes_of(opt: OptimizedModel, profiles: Any) -> dict[str, list[list[int]]]:
    """The profile of each input. Raises: ExportError."""
    from torch import Tensor

    from tokcompile.exports.batch import profile_shapes

    given = {name: v for name, v in zip(opt.input_names, opt.example_inputs, strict=True) if isinstance(v, Tensor)}
    return profile_shapes(profiles, list(given), list(given.values()))


def library_for(target: str, given: str | os.PathLike[str] | None) -> str:
    """The plugin library: the given one, or one built for this machine. Raises: EngineError."""
    if given is not None:
        if not os.path.isfile(given):
            raise EngineError(
                f"plugin_library={os.fspath(given)!r} is not a file\n  what to do: build it with "
                "`python -m tokcompile.plugins.build`, or pass plugins=False"
            )
        return os.path.abspath(given)
    try:
        from tokcompile.plugins.build import build
    except ImportError as error:
        raise EngineError(f"the plugin library cannot be built: {error}\n  what to do: pass plugins=False") from error
    presets = {"jetpack6": "jetpack6", "jetpack7": "jetpack7"}
    return os.path.abspath(build(preset=presets.get(target, "x86")))


def run_backend(
    backend: str, spec: Mapping[str, Any], target: str, capabilities: Sequence[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """What the backend said, and the devices it built for."""
    if backend == "tensorrt_rtx":
        from tokcompile.exports import tensorrt_rtx

        chosen = tensorrt_rtx.check_capabilities(capabilities or tensorrt_rtx.DEFAULT_CAPABILITIES)
        return tensorrt_rtx.build(spec, chosen), chosen
    from tokcompile.exports import tensorrt_api

    return tensorrt_api.build(spec, target), []


def look_at(result: Mapping[str, Any], exported: Any, plugins: bool, report: EngineReport) -> None:
    """Checks the network and fills in the report. Raises: EngineError."""
    from tokcompile.exports.network import check_network

    report.inputs, report.outputs = result["inputs"], result["outputs"]
    report.warnings = list(dict.fromkeys(text for level, text in result["messages"] if level == "warning"))
    report.onnx_error, report.note = exported.error, exported.note
    if result["layers"] is None:
        report.note = "; ".join(filter(None, (report.note, "trtexec does not list the network: token counts unchecked")))
        return
    seen = check_network(result["layers"], exported.reductions, plugins)
    report.layers, report.plugin_layers, report.tokens = seen.layers, seen.plugin_layers, seen.tokens
    plain = sorted({r["method"] for r in exported.reductions if not r["fused"]})
    if plugins and plain:
        report.note = "; ".join(filter(None, (report.note, f"in plain ops, as there is no kernel: {', '.join(plain)}")))
