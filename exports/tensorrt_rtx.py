"""TensorRT-RTX: engines built ahead of time, on a machine with or without a GPU, for the GPUs that it names.

The wheels `tensorrt-rtx-cu13-bindings` and `-libs` (the extra `rtx`) are enough. The ONNX parser opens its own library by
the name without a version to reach the plugin registry, which the wheel does not ship: without the link made here the
process aborts at the first plugin node. The loader reads its search path once, so it is set before the process starts.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tokcompile.errors import EngineError
from tokcompile.exports.process import run_builder

VERSION = "1.7.1"  # the one that the link was seen to work with
BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "tensorrt_rtx_libs"
CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
DEFAULT_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
INSTALL = f'pip install "tokcompile[rtx]"  # tensorrt-rtx-cu13 {VERSION}, Linux x86-64, about 95 MB'


def version() -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version("tensorrt-rtx-cu13-bindings") if importlib.util.find_spec(LIBRARIES) else None
    except metadata.PackageNotFoundError:
        return None


def build(spec: Mapping[str, Any], capabilities: Sequence[str] | None) -> dict[str, Any]:
    """Builds what `builder.py` is told to. Raises: EngineError."""
    chosen = check_capabilities(DEFAULT_CAPABILITIES if capabilities is None else capabilities)
    if version() is None:
        raise EngineError(f"TensorRT-RTX is not installed\n  what to do: {INSTALL}")
    with library_path() as environment:
        return run_builder("TensorRT-RTX", {**spec, "module": BINDINGS, "compute_capabilities": chosen}, environment)


def check_capabilities(names: Sequence[str]) -> list[str]:
    """Raises: EngineError for a GPU that TensorRT-RTX does not build for."""
    chosen = [names] if isinstance(names, str) else list(names)
    wrong = [name for name in chosen if name not in CAPABILITIES]
    if wrong or not chosen:
        raise EngineError(
            f"compute_capabilities={chosen!r}: TensorRT-RTX builds for {', '.join(CAPABILITIES)}\n"
            '  what to do: choose among them; for Jetson, H100 and B200 use backend="tensorrt"'
        )
    return list(dict.fromkeys(chosen))


@contextmanager
def library_path() -> Iterator[dict[str, str]]:
    """An environment in which the parser finds its library by the name that it asks for."""
    spec = importlib.util.find_spec(LIBRARIES)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(prefix="tokcompile-rtx-") as links:
        for library in folder.glob("lib*.so.*"):
            Path(links, library.name.partition(".so")[0] + ".so").symlink_to(library)
        paths = [links, str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
