"""Stands in for the package tensorrt: an "engine" is JSON that names an ONNX file, which onnxruntime runs."""

import ctypes
import enum
import json
import os

import numpy as np
import onnxruntime as ort

__version__ = os.environ.get("STAND_IN_TENSORRT", "10.3.0")
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT32", "INT64", "BOOL"])
TYPES = {"float": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


class Logger:
    WARNING = 2

    def __init__(self, severity):
        self.severity = severity


class Registry:
    def __init__(self):
        self.loaded = []

    def load_library(self, plugin_path):
        assert isinstance(plugin_path, str)
        with open(plugin_path) as file:
            if file.read() != "a plugin library":
                return None
        self.loaded.append(plugin_path)
        return object()


class Runtime:
    def __init__(self, logger):
        self.registry = Registry()

    def get_plugin_registry(self):
        return self.registry

    def deserialize_cuda_engine(self, data):
        plan = json.loads(data)
        if plan["tensorrt"] != __version__ or (plan["plugin"] and not self.registry.loaded):
            return None
        return Engine(plan["plain"])


class Engine:
    def __init__(self, path):
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.tensors = {v.name: v for v in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_dtype(self, name):
        return DataType[TYPES[self.tensors[name].type[len("tensor(") : -1]]]

    def get_tensor_shape(self, name):
        return tuple(self.tensors[name].shape)

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def memory(self, name):
        shape, dtype = self.engine.get_tensor_shape(name), NUMPY[self.engine.get_tensor_dtype(name).name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def execute_async_v3(self, stream_handle):
        assert isinstance(stream_handle, int)
        session = self.engine.session
        names = [o.name for o in session.get_outputs()]
        values = session.run(names, {i.name: self.memory(i.name).copy() for i in session.get_inputs()})
        for name, value in zip(names, values, strict=True):
            self.memory(name)[...] = value
        return True
