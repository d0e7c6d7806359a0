"""Bundles for the tests, made once each, and running what is in them with stand-ins for TensorRT, CUDA and cmake."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import tokcompile
from tests.conftest import build
from tests.exports.models import tiny
from tokcompile.exports.bundle_files.common import sha256
from tokcompile.exports.onnx import export_onnx

TARGETS = ("jetson-orin", "jetson-thor", "x86")
STAND_INS = Path(__file__).parent / "stand_ins"
EXPORTED: dict[Any, Any] = {}
FOLDERS: list[tempfile.TemporaryDirectory] = []
SCRIPTS = ("build.sh", "run.py", "verify.py")


@functools.cache
def vit() -> tokcompile.OptimizedModel:
    """A tiny ViT of timm with two reductions."""
    return tokcompile.optimize(*build("timm/vit"), method="tome", budget=0.6, where=[0, 1])


@functools.cache
def small(method: str) -> tokcompile.OptimizedModel:
    return tiny(method=method)


@functools.cache
def made(target: str) -> Path:
    """A bundle that is not to be changed; its archive is beside it."""
    folder = new_folder() / "vit"
    with mock.patch("tokcompile.exports.onnx.export_onnx", export_again):
        vit().bundle(folder, target=target)
    return folder


def export_again(opt, path, *, target, form, precision):
    """Stands in for export_onnx, which takes seconds: a model is exported once, for whichever target is the first."""
    assert precision is None
    if (opt, form) not in EXPORTED:
        EXPORTED[opt, form] = export_onnx(opt, new_folder() / "model.onnx", target=target, form=form)
    report = EXPORTED[opt, form]
    names = {kind: Path(path).with_name(Path(file).name) for kind, file in report.files.items()}
    files = {kind: os.fspath(name if form == "both" else path) for kind, name in names.items()}
    for kind, file in files.items():
        shutil.copy(report.files[kind], file)
    return dataclasses.replace(report, files=files)


def new_folder() -> Path:
    """A folder that is there as long as this process is."""
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="tokcompile-bundle-"))
    return Path(FOLDERS[-1].name)


@functools.cache
def home() -> Path:
    """A home for what is run: onnxruntime leaves a cache in it."""
    return new_folder()


def copy_of(target: str, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(made(target), tmp_path / "vit"))


def run(folder: Path, *command: str, stand_ins: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of a bundle, away from its folder, with nothing of CUDA or TensorRT at hand but the stand-ins."""
    path = [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    wanted = {"PATH": os.pathsep.join([str(STAND_INS / "bin"), *path] if stand_ins else path), "CUDA_HOME": "/nowhere"}
    if stand_ins:
        headers = folder / "build" / "headers"
        write_headers(headers, environment.get("STAND_IN_HEADERS", "10 3"))
        wanted |= {"PYTHONPATH": str(STAND_INS), "TENSORRT_INCLUDE_DIR": str(headers)}
    wanted |= {"HOME": str(home()), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    script = [str(folder / command[0]), *command[1:]]
    return subprocess.run(
        script if command[0].endswith(".sh") else [sys.executable, *script],
        cwd="/", env=wanted, capture_output=True, text=True,
    )  # fmt: skip


def write_headers(folder: Path, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = version.split()
    (folder / "NvInfer.h").touch()
    (folder / "NvInferVersion.h").write_text(
        f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE {minor} //!< minor\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.\n"
    )


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def rehash(folder: Path) -> None:
    """Writes the checksums of the files as they are now into manifest.json."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    path.write_text(json.dumps(manifest))
