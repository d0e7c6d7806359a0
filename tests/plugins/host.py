"""The kernels' build for the CPU: plugins/host_test/host.cpp, compiled once for every state of its sources."""

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"


@functools.cache
def host_library() -> Path:
    """Its path; skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the kernels' host build needs g++")
    sources = sorted(p for folder in ("kernels", "host_test") for p in (PLUGINS / folder).glob("*.*") if p.is_file())
    key = hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[:16]
    path = ROOT / "build" / "host_kernels" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        flags = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
        done = subprocess.run(
            [compiler, *flags, str(PLUGINS / "host_test" / "host.cpp"), "-o", str(temporary)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        temporary.replace(path)
    return path
