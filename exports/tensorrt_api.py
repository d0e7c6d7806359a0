"""TensorRT on the machine with the GPU: through its Python package where that is installed, else through trtexec."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tokcompile.errors import EngineError
from tokcompile.exports.process import ending, explain, run_builder

USUAL_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")


def version() -> str | None:
    """The version of the installed Python package, or None."""
    if importlib.util.find_spec("tensorrt") is None:
        return None
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def find_trtexec() -> str | None:
    """trtexec on PATH, or where NVIDIA's packages put it."""
    return shutil.which("trtexec") or next((p for p in USUAL_PLACES if os.access(p, os.X_OK)), None)


def build(spec: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Builds for the GPU of this machine. Raises: EngineError, with the commands to run elsewhere if there is no TensorRT."""
    if version() is not None:
        return run_builder("TensorRT", {**spec, "module": "tensorrt", "compute_capabilities": []}, os.environ)
    program = find_trtexec()
    if program is None:
        raise EngineError(f"TensorRT is not installed here: neither its Python package nor trtexec was found\n{advice(target)}")
    return run_trtexec(program, spec, target)


def advice(target: str) -> str:
    """What to run instead, on the machine that the engine is for."""
    from tokcompile.exports.targets import BOTH, get_target

    file = "model.plain.onnx" if get_target(target).file == BOTH else "model.onnx"
    line = shlex.join(command("trtexec", {"onnx": file, "engine": "model.plan", "plugins": [], "profiles": {}}, target))
    return (
        f'  what to do: write the ONNX file here,\n    opt.export_onnx("model.onnx", target="{target}")\n'
        f"  copy it to the machine that the engine is for, and there run\n    {line}\n"
        '  or build with backend="tensorrt_rtx", which needs no GPU, for an RTX card or an A100'
    )


def command(program: str, spec: Mapping[str, Any], target: str) -> list[str]:
    from tokcompile.exports.trtexec import command as trtexec_command

    plugin = next(iter(spec["plugins"]), None)
    profiles = {name: tuple(map(tuple, shapes)) for name, shapes in spec["profiles"].items()}
    device = "tensorrt" if target.startswith("tensorrt") else target
    oldest = {"tensorrt_10": "10.0", "tensorrt_11": "11.0"}.get(target)
    return trtexec_command(
        spec["onnx"], spec["engine"], target=device, tensorrt=oldest, plugin=plugin, profiles=profiles, trtexec=program
    )


def run_trtexec(program: str, spec: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Builds with trtexec, which says nothing about the network it parsed: layers stay unknown."""
    start = time.perf_counter()
    line = command(program, spec, target)
    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    engine = Path(spec["engine"])
    if done.returncode or not engine.stat().st_size:
        log = "\n".join(text for text in (done.stdout + done.stderr).splitlines() if "[E]" in text or "rror" in text)
        raise EngineError(explain(f"trtexec ended {ending(done.returncode)}: {shlex.join(line)}", log))
    found = re.search(r"TensorRT[ .]v?(\d[\d.]*)", done.stdout)
    warnings = [["warning", text] for text in done.stdout.splitlines() if "[W]" in text]
    return {
        "version": f"{found[1] if found else ''} (trtexec)".strip(), "seconds": time.perf_counter() - start,
        "bytes": engine.stat().st_size, "layers": None, "inputs": [], "outputs": [], "messages": warnings,
    }  # fmt: skip
