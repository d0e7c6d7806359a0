"""The texts of a bundle that differ from one to the next: README.md, settings.sh and Triton's config.pbtxt."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from tokcompile.exports.targets import PLAIN, PLUGIN
from tokcompile.exports.trtexec import PLUGIN_LIBRARY, Device, command

if TYPE_CHECKING:
    from tokcompile.exports.bundle import BundleReport

LIBRARY = f"build/plugin/{PLUGIN_LIBRARY}"
TRITON_TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "uint8": "UINT8", "int32": "INT32",
    "int64": "INT64", "bool": "BOOL",
}  # fmt: skip


def texts(manifest: dict[str, Any], device: Device, report: BundleReport) -> dict[str, str]:
    """{path in the bundle: text}."""
    return {
        "settings.sh": settings(manifest, device),
        "README.md": readme(manifest, device, report),
        f"triton/model_repository/{manifest['name']}/config.pbtxt": triton_config(manifest),
    }


def line(device: Device, form: str, tensorrt: str) -> list[str]:
    """The trtexec line that build.sh runs in the bundle's folder."""
    plugin = LIBRARY if form == PLUGIN else None
    return command(f"model.{form}.onnx", f"build/model.{form}.engine", target=device.name, tensorrt=tensorrt, plugin=plugin)


def settings(manifest: dict[str, Any], device: Device) -> str:
    values = {
        "name": manifest["name"],
        "title": device.title,
        "machine": device.machine,
        "preset": device.preset,
        "has_plugin": int(PLUGIN in manifest["models"]),
        "has_plain": int(PLAIN in manifest["models"]),
        "oldest_plugin": device.tensorrt,
        "oldest_plain": "10.0",
        "usual_trtexec": device.trtexec,
        "include_dir": device.include,
    }
    rows = [f"# What build.sh reads; written by tokcompile {manifest['tokcompile']}.", "# shellcheck shell=bash disable=SC2034"]
    rows += [f"{key}={shlex.quote(str(value))}" for key, value in values.items()]
    for form in manifest["models"]:
        for major in ("10.0", "11.0"):
            flags = " ".join(map(shlex.quote, line(device, form, major)[1:]))
            rows.append(f"flags_{form}_{major[:2]}=({flags})")
    return "\n".join(rows) + "\n"


def triton_config(manifest: dict[str, Any]) -> str:
    """max_batch_size 0: the shapes are the model's own, batch included."""
    rows = [f'name: "{manifest["name"]}"', 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    for kind in ("inputs", "outputs"):
        entries = []
        for row in manifest[kind]:
            dims = row["shape"] or [1]  # a scalar; Triton has no shape without dimensions
            reshape = "" if row["shape"] else " reshape { shape: [ ] }"
            entries.append(f'  {{ name: "{row["name"]}" data_type: TYPE_{TRITON_TYPES[row["dtype"]]} dims: {dims}{reshape} }}')
        rows += [f"{kind[:-1]} [", ",\n".join(entries), "]"]
    return "\n".join([*rows, "instance_group [ { kind: KIND_GPU count: 1 } ]"]) + "\n"


def readme(manifest: dict[str, Any], device: Device, report: BundleReport) -> str:
    models, jetson = manifest["models"], device.name.startswith("jetson")
    plugin = PLUGIN in models
    form = PLUGIN if plugin else PLAIN
    counts = ", ".join(f"{n} {name}" for name, n in manifest["plugins"].items())
    values = {
        "name": manifest["name"],
        "title": device.title,
        "version": manifest["tokcompile"],
        "method": manifest["method"],
        "reductions": f"{len(manifest['plan']['reductions'])} reduction{'s' * (len(manifest['plan']['reductions']) != 1)}",
        "tensorrt": device.tensorrt if plugin else "10.0",
        "cuda": device.cuda,
        "sm": ", ".join(f"{sm // 10}.{sm % 10}" for sm in device.sm),
        "precision": manifest["precision"],
        "inputs": shapes(manifest["inputs"]),
        "outputs": shapes(manifest["outputs"]),
        "note": "\n".join(["", *(f"Note: {text}." for text in report.notes)]) if report.notes else "",
        "plugins": PLUGIN_NOTE.format(counts=counts) if plugin else NO_PLUGIN_NOTE,
        "copy": (COPY_ARCHIVE if report.archive else COPY_FOLDER).format(folder=shlex.quote(os.path.basename(report.path))),
        "result": f"`build/model.{form}.engine`" + (f" and `{LIBRARY}`" if plugin else ""),
        "makes": MAKES_BOTH if plugin else "It runs `trtexec`, which takes minutes.",
        "requirements": requirements(device, plugin),
        "commands": "\n".join("    " + shlex.join(line(device, kind, "10.0")) for kind in models),
        "clocks": CLOCKS if jetson else "Other programs on the GPU disturb them; `nvidia-smi` shows which there are.",
        "packages": PACKAGES_JETSON.format(cuda="12.6" if device.cuda == "12.6" else "13.0", next=int(device.cuda[:2]) + 1)
        if jetson else PACKAGES_X86,
        "example": f"build/cpp/example build/model.{form}.engine" + (f" --plugin {LIBRARY}" if plugin else "")
        + " " + " ".join(manifest["goldens"][0]["inputs"]),
        "triton": TRITON if plugin else "It needs no plugin.",
        "files": "\n".join(f"| `{name}` | {what} |" for name, what in contents(manifest, plugin)),
    }  # fmt: skip
    template = (Path(__file__).parent / "bundle_files" / "README.md").read_text(encoding="utf-8")
    return Template(template).substitute(values)


def shapes(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"`{r['name']}` {r['dtype']} {'x'.join(map(str, r['shape'])) or 'scalar'}" for r in rows)


def requirements(device: Device, plugin: bool) -> str:
    jetson = device.name.startswith("jetson")
    got = "`sudo apt install nvidia-jetpack cmake` installs all of it" if jetson else "from NVIDIA's TensorRT and CUDA packages"
    rows = [f"- TensorRT with `trtexec` (in PATH or `{device.trtexec}`): {got}"]
    if plugin:
        rows.append("- `nvcc` (in PATH or `/usr/local/cuda/bin`), a C++17 compiler and `cmake`")
        rows.append(f"- the TensorRT headers (`{device.include}`)")
    return "\n".join([*rows, "- `python3`, with which it checks the files first"])


def contents(manifest: dict[str, Any], plugin: bool) -> list[tuple[str, str]]:
    rows = [
        ("build.sh", "builds plugin and engine; `./build.sh --help`"),
        ("settings.sh", "what build.sh reads"),
        ("run.py, verify.py", "time and check the engine; `--help`, `--dry-run`"),
        ("common.py, engine.py", "what both share"),
        ("manifest.json", "plan, versions, checksums of all files"),
    ]
    about = {PLUGIN: "the model with one node for each reduction", PLAIN: "the model in ordinary ops"}
    rows += [(file, about[form]) for form, file in manifest["models"].items()]
    if plugin:
        rows.append(("plugins/", "sources of the plugin library, with presets for cmake"))
    return [
        *rows,
        ("goldens/", "inputs and what PyTorch gave for them"),
        ("cpp/", "C++ example, and plugin loading for Triton"),
        ("triton/", "model repository of the Triton Inference Server"),
    ]


PLUGIN_NOTE = """\
The reductions ({counts}) run in a plugin library that build.sh compiles here. Without it, `./build.sh --plain` builds the same
model from ordinary ops (`model.plain.onnx`, TensorRT 10.0 or later)."""
NO_PLUGIN_NOTE = "The engine is made of ordinary TensorRT ops and needs no plugin library."
MAKES_BOTH = "It compiles the plugin library with the device's own `nvcc` and `cmake`, then runs `trtexec`; both take minutes."
CLOCKS = """\
For steady numbers, first `sudo nvpmodel -m 0` (the strongest power
mode of most boards; `nvpmodel -q` says which is set) and `sudo jetson_clocks`."""
PACKAGES_JETSON = """\
    sudo apt install python3-libnvinfer python3-numpy python3-venv
    python3 -m venv --system-site-packages ~/bundle-env     # TensorRT's package is the system's
    . ~/bundle-env/bin/activate
    pip install 'cuda-python>={cuda},<{next}'"""
PACKAGES_X86 = """\
    python3 -m venv ~/bundle-env
    . ~/bundle-env/bin/activate
    pip install numpy cuda-python 'tensorrt==10.14.*'       # with the version that build.sh printed"""
COPY_ARCHIVE = """\
    scp {folder}.tar.gz user@device:
    ssh user@device
    tar xzf {folder}.tar.gz
    cd {folder}"""
COPY_FOLDER = """\
    scp -r {folder} user@device:
    ssh user@device
    cd {folder}"""
TRITON = """\
The server must load the plugin before the engine. Its `plugins` option and LD_PRELOAD only open a library, while ours is
registered by a call; `triton/libtokcompile_register.so` makes that call for the library beside it:

    tritonserver --model-repository=triton/model_repository \\
      --backend-config=tensorrt,plugins=$PWD/triton/libtokcompile_register.so

or `LD_PRELOAD=$PWD/triton/libtokcompile_register.so tritonserver ...`. (Not run by us on a server yet.)"""
