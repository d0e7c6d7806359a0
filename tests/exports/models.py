"""A model that exports fast, and reading back what was exported."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

import tokcompile
from tests.models.family import seeded
from tests.shared import shared

DYNAMIC = {"If", "Loop", "Scan", "NonZero", "Unique", "Compress"}


@functools.cache
def encoder(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Two blocks over fifty tokens."""
    with seeded():
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(dtype)
        return shared(model), (torch.randn(1, 50, 32).to(dtype),)


def tiny(dtype: torch.dtype = torch.float32, **options) -> tokcompile.OptimizedModel:
    """The same, optimized."""
    torch.manual_seed(0)
    return tokcompile.optimize(*encoder(dtype), **{"budget": 0.5, **options})


def all_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the graph and of its functions."""
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def reductions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "tokcompile"]


def attributes(node: onnx.NodeProto) -> dict:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def session(path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What onnxruntime makes of a file."""
    values = session(path).run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(np.asarray(value)) for value in values]


def same(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 1e-4) -> bool:
    """Whether each output is there and equal up to a share of its largest value."""
    pairs = list(zip(got, want, strict=True))
    return all(g.shape == w.shape and (g - w).abs().max() <= tolerance * w.abs().max() for g, w in pairs)
