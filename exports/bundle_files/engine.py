"""A TensorRT engine with its plugin and its buffers, through the packages tensorrt and cuda-python (10 and later)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import BundleError, numpy_dtype

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
          "INT64": "int64", "BOOL": "bool"}  # fmt: skip


def import_cudart() -> Any:
    """The CUDA runtime's bindings, under the new name or the one before cuda-python 12.8."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        try:
            from cuda import cudart
        except ImportError:
            raise BundleError("the Python package cuda-python is missing: see README.md, 3. Python packages") from None
    return cudart


def import_tensorrt() -> Any:
    try:
        import tensorrt as trt
    except ImportError as error:
        raise BundleError(
            f"TensorRT's Python package is missing ({error}): see README.md, 3. Python packages. On a Jetson it comes with "
            "apt for the system's python3, so a virtual environment needs --system-site-packages."
        ) from None
    if int(trt.__version__.split(".")[0]) < 10:
        raise BundleError(f"TensorRT {trt.__version__} is too old: 10.0 or later is needed")
    return trt


class Engine:
    """An engine file, ready to run; `with` gives its memory back."""

    def __init__(self, path: Path, plugin: Path | None, manifest: dict):
        self.trt, self.cudart = import_tensorrt(), import_cudart()
        self.inputs = {row["name"]: row for row in manifest["inputs"]}
        self.outputs = {row["name"]: row for row in manifest["outputs"]}
        self.buffers: dict[str, int] = {}
        self.logger = self.trt.Logger(self.trt.Logger.WARNING)
        if hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(self.logger, "")
        self.runtime = self.trt.Runtime(self.logger)
        if plugin is not None and self.runtime.get_plugin_registry().load_library(str(plugin)) is None:
            raise BundleError(f"TensorRT {self.trt.__version__} cannot load the plugin library {plugin}")
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise BundleError(
                f"TensorRT {self.trt.__version__} does not take {path}: engines belong to one TensorRT version and one kind "
                "of GPU. Run ./build.sh again on this device; the lines above say what TensorRT found."
            )
        self.check_tensors(path)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise BundleError("TensorRT could not make an execution context: is there enough memory left?")
        self.stream = self.cuda(self.cudart.cudaStreamCreate())
        for name in self.names:
            self.buffers[name] = self.cuda(self.cudart.cudaMalloc(max(1, self.bytes_of(name))))
            self.context.set_tensor_address(name, self.buffers[name])

    def check_tensors(self, path: Path) -> None:
        """Refuses an engine whose inputs and outputs are not those of the manifest."""
        known = {**self.inputs, **self.outputs}
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        for name in self.names:
            dtype = self.engine.get_tensor_dtype(name).name
            found = DTYPES.get(dtype, dtype), list(self.engine.get_tensor_shape(name))
            wanted = (known[name]["dtype"], known[name]["shape"]) if name in known else None
            if found != wanted:
                raise BundleError(f"{path}: tensor {name!r} is {found}, but {wanted} in manifest.json: run ./build.sh again")
        if missing := [name for name in self.outputs if name not in self.names]:
            raise BundleError(f"{path} lacks the outputs {', '.join(missing)}: run ./build.sh again")

    def bytes_of(self, name: str) -> int:
        row = self.inputs.get(name) or self.outputs[name]
        count = 1
        for size in row["shape"]:
            count *= size
        return count * numpy_dtype(row["dtype"]).itemsize

    def cuda(self, result: tuple) -> Any:
        """The value of a call of the CUDA runtime."""
        error, *values = result
        if int(error):
            text = self.cudart.cudaGetErrorString(error)[1]
            raise BundleError(f"CUDA: {text.decode() if isinstance(text, bytes) else text} (error {int(error)})")
        return values[0] if values else None

    def put(self, arrays: dict) -> None:
        """Copies inputs to the device; an engine keeps only those that its network reads."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name, array in arrays.items():
            if name in self.buffers:
                self.cuda(self.cudart.cudaMemcpy(self.buffers[name], array.ctypes.data, array.nbytes, kind))

    def get(self) -> dict:
        """Copies all outputs from the device."""
        import numpy as np

        kind, arrays = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, {}
        for name, row in self.outputs.items():
            arrays[name] = np.empty(row["shape"], numpy_dtype(row["dtype"]))
            self.cuda(self.cudart.cudaMemcpy(arrays[name].ctypes.data, self.buffers[name], arrays[name].nbytes, kind))
        return arrays

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream)):
            raise BundleError("TensorRT could not run the engine; the lines above say why")

    def synchronize(self) -> None:
        self.cuda(self.cudart.cudaStreamSynchronize(self.stream))

    def infer(self, arrays: dict) -> dict:
        """Outputs for inputs, by name."""
        self.put(arrays)
        self.enqueue()
        self.synchronize()
        return self.get()

    def latencies(self, count: int) -> tuple[list[float], list[float]]:
        """Milliseconds of each of `count` calls, on the GPU and as the caller waits for them; without copies."""
        start, stop = (self.cuda(self.cudart.cudaEventCreate()) for _ in range(2))
        gpu, host = [], []
        for _ in range(count):
            begin = time.perf_counter()
            self.cuda(self.cudart.cudaEventRecord(start, self.stream))
            self.enqueue()
            self.cuda(self.cudart.cudaEventRecord(stop, self.stream))
            self.synchronize()
            host.append((time.perf_counter() - begin) * 1e3)
            gpu.append(self.cuda(self.cudart.cudaEventElapsedTime(start, stop)))
        for event in (start, stop):
            self.cuda(self.cudart.cudaEventDestroy(event))
        return gpu, host

    def throughput(self, count: int) -> float:
        """Calls a second when the next is enqueued without waiting for the last."""
        begin = time.perf_counter()
        for _ in range(count):
            self.enqueue()
        self.synchronize()
        return count / (time.perf_counter() - begin)

    def device_name(self) -> str:
        name = self.cuda(self.cudart.cudaGetDeviceProperties(0)).name
        return name.decode() if isinstance(name, bytes) else str(name)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        for pointer in self.buffers.values():
            self.cudart.cudaFree(pointer)
        self.buffers = {}
        self.cudart.cudaStreamDestroy(self.stream)
