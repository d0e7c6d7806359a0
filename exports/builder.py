"""Builds one engine: a script that runs in a process of its own, as an abort in TensorRT must not take its caller along.

    python builder.py SPEC.json RESULT.json

SPEC: module, onnx, engine, plugins, compute_capabilities, profiles. RESULT: what the parsed network and the build said.
It imports nothing of tokcompile, so that it starts in a moment and runs beside any torch.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

# this folder holds modules named onnx and torch_tensorrt, which must not hide the packages
sys.path[:] = sys.path[1:] if __name__ == "__main__" else sys.path


def logger(trt: Any, messages: list[list[str]]) -> Any:
    """A logger that keeps warnings and errors, and also prints them, in case the process does not live to report."""

    class Log(trt.ILogger):
        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                name = str(severity).rpartition(".")[2].lower()
                messages.append([name, text])
                print(f"[{name}] {text}", file=sys.stderr, flush=True)

    return Log()


def build(spec: dict[str, Any], result: dict[str, Any]) -> None:
    """Parses, walks and builds; fills in `result`, whose "stage" says how far it came."""
    trt = importlib.import_module(spec["module"])
    result["version"] = trt.__version__
    log = logger(trt, result["messages"])
    result["stage"] = "plugins"
    if spec["module"] == "tensorrt":
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    for path in spec["plugins"]:
        if builder.get_plugin_registry().load_library(path) is None:
            raise RuntimeError(f"the plugin library {path} cannot be loaded")
    result["stage"] = "parse"
    flags = trt.NetworkDefinitionCreationFlag
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0  # a later release knows no other
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(spec["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise RuntimeError("\n".join(f"node {e.node_name() or e.node()}: {e.desc()}" for e in errors) or "no reason given")
    result["layers"] = [layer(network.get_layer(i)) for i in range(network.num_layers)]
    result["inputs"] = [tensor(network.get_input(i)) for i in range(network.num_inputs)]
    result["outputs"] = [tensor(network.get_output(i)) for i in range(network.num_outputs)]
    result["stage"] = "build"
    config = configure(trt, builder, spec)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("the build gave no engine")
    result["seconds"] = time.perf_counter() - start
    with open(spec["engine"], "wb") as file:
        file.write(memoryview(engine))
    result["bytes"], result["stage"] = engine.nbytes, "done"


def configure(trt: Any, builder: Any, spec: dict[str, Any]) -> Any:
    """The devices of a TensorRT-RTX engine, and the range of each dynamic input."""
    config = builder.create_builder_config()
    if spec["compute_capabilities"]:
        config.num_compute_capabilities = len(spec["compute_capabilities"])
        for i, name in enumerate(spec["compute_capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if spec["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in spec["profiles"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    return config


def layer(value: Any) -> dict[str, Any]:
    outputs = [value.get_output(i) for i in range(value.num_outputs)]
    return {
        "type": str(value.type).rpartition(".")[2],
        "name": value.name,
        "outputs": [tensor(out) for out in outputs if out is not None],
    }


def tensor(value: Any) -> dict[str, Any]:
    try:
        shape = list(value.shape)
    except ValueError:  # a rank that is not known yet
        shape = []
    return {"name": value.name, "shape": shape, "dtype": str(value.dtype).rpartition(".")[2].lower()}


def main(spec_path: str, result_path: str) -> int:
    with open(spec_path, encoding="utf-8") as file:
        spec = json.load(file)
    result: dict[str, Any] = {"stage": "import", "version": "", "messages": [], "layers": [], "error": ""}
    try:
        build(spec, result)
    except Exception as error:
        result["error"] = f"{error}" or type(error).__name__
    with open(result_path, "w", encoding="utf-8") as file:
        json.dump(result, file)
    return 0 if result["stage"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
