"""The bundle: one folder, and archive, with all that a device needs to build, check and time the engine of a model.

The files of `bundle_files/` are copied as they are, and read what is special to this bundle from manifest.json (the
Python scripts) and settings.sh (build.sh); the texts in `bundle_texts.py` are filled in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tarfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

import tokcompile.plugins
from tokcompile.errors import ExportError
from tokcompile.exports.bundle_files.common import FORMAT, sha256
from tokcompile.exports.targets import BOTH, PLAIN, PLUGIN
from tokcompile.exports.trtexec import PLUGIN_LIBRARY, Device, get_device
from tokcompile.files import atomic, atomic_folder, parents
from tokcompile.plugins.contract import DOMAIN

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel
    from tokcompile.exports.onnx import ExportReport

FILES = Path(__file__).parent / "bundle_files"
PLUGINS = Path(str(tokcompile.plugins.__file__)).parent
SOURCES = ("CMakeLists.txt", "CMakePresets.json", "kernels", "tensorrt")

# Largest difference to PyTorch as a share of an output's largest value. TensorRT computes float32 as TF32 by default.
TOLERANCES = {
    "onnxruntime": {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1},
    "tensorrt": {"float32": 1e-2, "float16": 3e-2, "bfloat16": 1e-1},
}


@dataclass
class BundleReport:
    """What was written. models: the ONNX files by form. notes: what a person should know about this bundle."""

    path: str
    archive: str | None
    target: str
    models: dict[str, str] = field(default_factory=dict)
    reductions: dict[str, int] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        where = self.path + (f" and {self.archive}" if self.archive else "")
        lines = [f"{where}: {self.files} files, {self.bytes / 1e6:.1f} MB, for {self.target}"]
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])


def bundle(
    opt: OptimizedModel,
    path: str | os.PathLike[str],
    *,
    target: str,
    precision: str | None = None,
    form: str | None = None,
    name: str | None = None,
    plugin_library: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    archive: bool = True,
    overwrite: bool = False,
) -> BundleReport:
    """Writes the folder `path`, and `path`.tar.gz, to copy to a device; its README.md says how to go on there.

    target: "jetson-orin", "jetson-thor" or "x86". precision: "fp16" or "bf16" converts the model first. form: "both" (the
    default), or "plugin" or "plain" for one ONNX file only. name: of the model in Triton, the folder's by default.
    plugin_library: a libtokcompile_plugins.so that was built for the target, which build.sh can take instead of compiling.
    tolerance: of verify.py, of the dtype by default. overwrite: whether an earlier folder and archive may be replaced.

    Folders that `path` is in are created where they are missing.

    Raises: ExportError, and leaves nothing behind then.
    """
    start = time.perf_counter()
    device = get_device(target)
    path = os.path.abspath(path)
    packed = f"{path}.tar.gz" if archive else None
    if packed and os.path.lexists(packed) and not overwrite:
        raise ExportError(f"{packed} is there already\n  what to do: choose another name, or pass overwrite=True")
    if form not in (None, BOTH, PLUGIN, PLAIN):
        raise ExportError(f"form={form!r} is none of {BOTH}, {PLUGIN}, {PLAIN}")
    if plugin_library is not None:
        check_library(plugin_library, device)
    report = BundleReport(path, packed, device.name)
    with ExitStack() as stack:
        stack.enter_context(parents(path))
        # the archive gets its name last: whoever finds it finds the folder too
        temporary = stack.enter_context(atomic(packed)) if packed else None
        folder = Path(stack.enter_context(atomic_folder(path, overwrite)))
        fill(opt, folder, device, precision, form or BOTH, model_name(name or os.path.basename(path)), tolerance, report)
        if plugin_library is not None:
            copy(plugin_library, folder / "bin" / PLUGIN_LIBRARY)
        write_manifest(folder)
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        report.files, report.bytes = len(sizes), sum(sizes)
        if temporary:
            pack(folder, temporary)
    report.seconds = time.perf_counter() - start
    return report


def fill(
    opt: OptimizedModel, folder: Path, device: Device, precision: str | None, form: str, name: str,
    tolerance: float | None, report: BundleReport,
) -> None:  # fmt: skip
    """Everything but the binaries; manifest.json without the checksums."""
    from tokcompile.exports import bundle_texts
    from tokcompile.exports.host import on_cpu
    from tokcompile.exports.onnx import export_onnx
    from tokcompile.exports.precision import convert

    file = folder / ("model.onnx" if form == BOTH else f"model.{form}.onnx")
    exported = export_onnx(opt, file, target=device.target, form=form, precision=precision)
    opt = on_cpu(convert(opt, precision))
    models = {kind: os.path.basename(written) for kind, written in exported.files.items()}
    if PLUGIN in models and not any(r["fused"] for r in exported.reductions):
        drop_plugin(opt, folder, models, report)
    dtype, notes = compute_dtype(opt), report.notes
    if exported.note:
        notes.append(exported.note)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "target": asdict(device) | {"tensorrt": device.tensorrt, "sm": device.sm},
        "tokcompile": tokcompile.__version__,
        "versions": versions(),
        "method": opt.plan.method,
        "budget": json.loads(opt.plan.json()).get("budget"),
        "plan": json.loads(opt.plan.json()),
        "precision": precision or dtype,
        "models": models,
        "plugins": plugins_of(folder / models[PLUGIN]) if PLUGIN in models else {},
        **io_of(folder / next(iter(models.values()))),
        "tolerance": {k: row[dtype] if tolerance is None else tolerance for k, row in TOLERANCES.items()},
    }
    manifest["goldens"] = write_goldens(opt, folder, exported, manifest, notes)
    report.models, report.reductions = dict(models), dict(manifest["plugins"])
    copy_files(folder, with_plugin=PLUGIN in models)
    for path, text in bundle_texts.texts(manifest, device, report).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    (folder / "triton" / "model_repository" / name / "1").mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def drop_plugin(opt: OptimizedModel, folder: Path, models: dict[str, str], report: BundleReport) -> None:
    """Leaves the plain file only, where no reduction has a plugin. Raises: ExportError where that was not asked for."""
    if PLAIN not in models:
        raise ExportError(f"{opt.plan.method} has no plugin for this model\n  what to do: form='plain', or leave form away")
    file = models.pop(PLUGIN)
    for name in (file, f"{file}.data"):
        (folder / name).unlink(missing_ok=True)
    if opt.plan.reductions:
        report.notes.append(f"{opt.plan.method} has no plugin for this model: its reductions are ordinary ops")


def compute_dtype(opt: OptimizedModel) -> str:
    """The least precise floating dtype of the model's weights, on which tolerances depend."""
    found = {str(v.dtype).removeprefix("torch.") for v in opt.graph_module.state_dict().values() if v.is_floating_point()}
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, np)}


def load_graph(file: Path) -> Any:
    import onnx

    return onnx.load(str(file), load_external_data=False).graph


def onnx_dtype(code: int) -> str:
    import onnx

    name = onnx.TensorProto.DataType.Name(code).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def plugins_of(file: Path) -> dict[str, int]:
    """How many nodes of each plugin a file has."""
    names = [node.op_type for node in load_graph(file).node if node.domain == DOMAIN]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def io_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Names, dtypes and shapes of the inputs and outputs as they stand in the ONNX file."""
    graph = load_graph(file)
    out: dict[str, list[dict[str, Any]]] = {}
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        out[kind] = []
        for value in values:
            tensor = value.type.tensor_type
            dtype = onnx_dtype(tensor.elem_type)
            out[kind].append({"name": value.name, "dtype": dtype, "shape": [d.dim_value for d in tensor.shape.dim]})
            if dtype == "float64":
                raise ExportError(f"{value.name!r} is float64, which TensorRT does not take: use a float32 model")
    return out


def write_goldens(
    opt: OptimizedModel, folder: Path, exported: ExportReport, manifest: dict[str, Any], notes: list[str]
) -> list[dict[str, list[str]]]:
    """The example inputs, and others drawn like them, with what torch makes of them."""
    from tokcompile.exports.verify import compare

    first = [v for v in opt.example_inputs if isinstance(v, Tensor)]
    written: list[dict[str, list[str]]] = []
    for inputs in (first, [redrawn(v) for v in first]):
        filled = iter(inputs)
        with torch.no_grad():
            values = opt.graph_module(*[next(filled) if isinstance(v, Tensor) else v for v in opt.example_inputs])
        kept = [v for v, n in zip(values, opt.graph_module.graph.output_node().args[0], strict=True) if isinstance(n, Node)]
        if written and PLAIN in manifest["models"]:
            plain, expected = str(folder / manifest["models"][PLAIN]), dict(zip(exported.outputs, kept, strict=True))
            try:
                compare(plain, exported.inputs, inputs, expected, exported.tolerance or None, half=exported.precision)
            except ExportError:
                notes.append("one golden example only: the second has near ties between tokens, which other rounding breaks")
                continue
        here = Path("goldens") / str(len(written))
        (folder / here).mkdir(parents=True)
        written.append({
            "inputs": save_all(folder, here, "input", inputs),
            "outputs": save_all(folder, here, "output", kept),
        })  # fmt: skip
    return written


def redrawn(value: Tensor) -> Tensor:
    """Other numbers like these, if they are such that can be: floats that are finite and not all the same."""
    if not value.is_floating_point() or not value.isfinite().all() or value.numel() < 2 or not value.float().std() > 0:
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return (noise * value.float().std() + value.float().mean()).to(value.dtype)


def save_all(folder: Path, here: Path, kind: str, values: Sequence[Tensor]) -> list[str]:
    """Writes .npy files and gives their paths in the bundle."""
    paths = []
    for i, value in enumerate(values):
        value = value.detach().cpu().contiguous()
        array = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
        paths.append((here / f"{kind}{i}.npy").as_posix())
        np.save(folder / paths[-1], array)
    return paths


def copy_files(folder: Path, with_plugin: bool) -> None:
    """The scripts, the C++ example, and the plugin's sources."""
    for source in sorted(FILES.rglob("*")):
        inside = source.relative_to(FILES)
        if source.is_file() and "__pycache__" not in inside.parts and inside.name not in ("README.md", "__init__.py"):
            copy(source, folder / inside, executable=inside.name in ("build.sh", "run.py", "verify.py"))
    if not with_plugin:
        return
    for name in SOURCES:
        if not (PLUGINS / name).exists():
            raise ExportError(f"the plugin sources lack {PLUGINS / name}: install tokcompile again, or pass form='plain'")
        for source in sorted([PLUGINS / name] if (PLUGINS / name).is_file() else (PLUGINS / name).rglob("*")):
            if source.is_file() and source.suffix not in (".pyc", ".o", ".so"):
                copy(source, folder / "plugins" / source.relative_to(PLUGINS))


def copy(source: str | os.PathLike[str], to: Path, executable: bool = False) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)
    to.chmod(0o755 if executable else 0o644)  # a wheel does not keep these


def check_library(path: str | os.PathLike[str], device: Device) -> None:
    """Refuses what is no library for the target. Raises: ExportError."""
    try:
        with open(path, "rb") as file:
            header = file.read(20)
    except OSError as error:
        raise ExportError(f"plugin_library {os.fspath(path)} cannot be read: {error.strerror}") from error
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise ExportError(f"plugin_library {os.fspath(path)} is not a shared library")
    machine = struct.unpack_from("<H", header, 18)[0]
    if machine != device.elf:
        raise ExportError(
            f"plugin_library {os.fspath(path)} is for another machine (ELF {machine}), and {device.name} is {device.machine} "
            f"(ELF {device.elf})\n  what to do: leave it away, so that build.sh compiles it on the device"
        )


def model_name(text: str) -> str:
    """A name that is good for a folder, for Triton and in shell lines."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "model"


def write_manifest(folder: Path) -> None:
    """Adds size and checksum of every other file to manifest.json."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path)
    manifest["files"] = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
    }  # fmt: skip
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def pack(folder: Path, archive: str) -> None:
    """A .tar.gz of the folder, whose files belong to whoever unpacks them."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name, filter=anonymous)
