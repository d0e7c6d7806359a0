"""Builds the kernels with nvcc into a shared library that knows nothing of torch, so that one build serves every version.

    python -m tokcompile.plugins.torch_library [--arch 80,90] [--output libtokcompile_kernels.so]

By default it goes to a cache folder (TOKCOMPILE_CACHE, else ~/.cache/tokcompile), under a name that says what it was built
from: `torch_ops` finds it there, and builds it on first use where it is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

log = logging.getLogger("tokcompile")
SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden")


class BuildError(RuntimeError):
    """The kernels could not be compiled."""


def build(arches: Sequence[int] | None = None, output: Path | None = None) -> Path:
    """Compiles the kernels with nvcc, or finds them compiled. arches: 80, 90, ...; those of the visible GPUs by default.

    Raises: BuildError.
    """
    arches = sorted(set(arches or local_arches()))
    if not arches:
        raise BuildError("no GPU is visible; say for which ones to build (--arch 80,90)")
    path = output or cache_folder() / f"libtokcompile_kernels-{source_key(arches)}.so"
    if output is None and path.exists():
        return path
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "nvcc was not found (CUDACXX, CUDA_HOME, PATH); or set TOKCOMPILE_KERNELS to a library built elsewhere"
        )
    log.info("building tokcompile's CUDA kernels for sm_%s", ", sm_".join(map(str, arches)))
    # another process may be building the same: each writes its own file and renames it
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    command = [nvcc, *FLAGS, *targets(arches), f"-I{SOURCES}", "-o", str(temporary), *map(str, sorted(SOURCES.glob("*.cu")))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{(done.stderr or done.stdout).strip()[-4000:]}")
        os.replace(temporary, path)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def targets(arches: Sequence[int]) -> list[str]:
    """nvcc's flags: machine code for each, and PTX of the newest for GPUs to come."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches]
    return [*flags, f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}"]


def local_arches() -> list[int]:
    """The compute capabilities of the visible GPUs: 90 for 9.0."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]


def find_nvcc() -> str | None:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.environ.get("CUDACXX", ""), *(f"{h}/bin/nvcc" for h in homes if h), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def cache_folder() -> Path:
    given = os.environ.get("TOKCOMPILE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokcompile"


def source_key(arches: Sequence[int]) -> str:
    """Says what a library was built from: the sources, the flags, the architectures."""
    key = hashlib.sha256(repr((FLAGS, list(arches))).encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".hpp")):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"sm{'_'.join(map(str, arches))}-{key.hexdigest()[:16]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tokcompile.plugins.torch_library", description="Builds the CUDA kernels for PyTorch."
    )
    parser.add_argument("--arch", help="compute capabilities, 80,90; those of the GPUs here by default")
    parser.add_argument("--output", type=Path, help="the file to write; in the cache folder by default")
    args = parser.parse_args(argv)
    try:
        print(build([int(a) for a in args.arch.split(",")] if args.arch else None, args.output))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
