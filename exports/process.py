"""Running `builder.py` in a process of its own, and making one message of whatever went wrong there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokcompile.errors import EngineError

SCRIPT = Path(__file__).with_name("builder.py")
TIMEOUT = 3600
LINES = 12  # of a log that are worth repeating

# what a message of the builder means for someone who did not write it
HINTS = {
    "Plugin not found": "load the plugin library with plugin_library=..., or build with plugins=False",
    "Could not create the plugin": "build the plugin library from this release; its reason is in the log",
    "cannot be loaded": "build it again on this machine: python -m tokcompile.plugins.build",
    "maximum value allowed (3840)": "plugins=True, or a smaller budget",
    "FP32 GEMM is not supported": "leave out SM75: scores inside reductions are float32 products, which it does not take",
    "libcuda": "TensorRT builds on the machine with the GPU; tensorrt_rtx builds anywhere",
}


def run_builder(backend: str, spec: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """What the builder found and wrote. Raises: EngineError where it failed, or did not live to say so."""
    with tempfile.TemporaryDirectory(prefix="tokcompile-") as folder:
        spec_path, result_path = os.path.join(folder, "spec.json"), os.path.join(folder, "result.json")
        with open(spec_path, "w", encoding="utf-8") as file:
            json.dump(spec, file)
        command = [sys.executable, str(SCRIPT), spec_path, result_path]
        try:
            done = subprocess.run(
                command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{backend} did not finish within {TIMEOUT // 60} minutes") from error
        if not os.path.exists(result_path):
            raise EngineError(explain(f"{backend} ended {ending(done.returncode)} without an engine", done.stderr))
        with open(result_path, encoding="utf-8") as file:
            result: dict[str, Any] = json.load(file)
    if result["stage"] != "done":
        where = {"import": "cannot be imported", "plugins": "does not take the plugin library"}
        what = where.get(result["stage"], f"refuses the model ({result['stage']})")
        raise EngineError(explain(f"{backend} {result['version']} {what}: {result['error']}".replace("  ", " "), done.stderr))
    return result


def ending(code: int) -> str:
    """How a process ended: by which signal, or with which code."""
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def explain(what: str, log: str) -> str:
    """The message with the last lines of the log, and what to do where that is known."""
    lines = list(dict.fromkeys(line.rstrip() for line in log.splitlines() if line.strip()))
    ours = [line for line in lines if "tokcompile plugin" in line]  # says which attribute, and what it may be
    others = [line for line in lines if "warning" not in line.lower() and line not in ours] or lines
    chosen = ours or others[-LINES:]
    text = "\n".join([what, *(f"  log: {line}" for line in chosen if line not in what)])
    hints = [hint for sign, hint in HINTS.items() if sign in text]
    return "\n".join([text, *(f"  what to do: {hint}" for hint in hints[:1])])
