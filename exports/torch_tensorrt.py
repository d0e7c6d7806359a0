"""Torch-TensorRT: converters that put our plugins where an optimized model calls its kernels. Not run, see docs/tensorrt.md.

Torch-TensorRT takes `opt.exported_program` as it is, in plain ATen. The plugin form needs the library and these converters:

    from tokcompile.exports.torch_tensorrt import register
    register("libtokcompile_plugins.so")
    fast = torch.compile(opt.cuda(), backend="torch_tensorrt")  # where the kernels run, see plugins/torch_ops.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tokcompile.errors import EngineError
from tokcompile.plugins.contract import PLUGIN_NAMESPACE, PLUGIN_VERSION, op_type
from tokcompile.plugins.torch_ops import KERNELS


def register(plugin_library: str | os.PathLike[str]) -> list[str]:
    """Loads the library and registers a converter for each op of ours; returns the names of the ops.

    Raises: EngineError where Torch-TensorRT or the library cannot be loaded.
    """
    try:
        import tensorrt
        from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
    except ImportError as error:
        raise EngineError(f"Torch-TensorRT is missing ({error})\n  what to do: pip install torch-tensorrt") from error
    if tensorrt.get_plugin_registry().load_library(os.path.abspath(plugin_library)) is None:
        raise EngineError(f"TensorRT cannot load {os.fspath(plugin_library)}\n  what to do: build it here, with `make plugins`")
    for name in KERNELS:
        dynamo_tensorrt_converter(getattr(torch.ops.tokcompile, name).default)(converter(tensorrt, name))
    return list(KERNELS)


def converter(trt: Any, name: str) -> Callable[..., tuple[Any, ...]]:
    """The converter of one op: its arguments as the attributes of plugins/contract.py."""

    def convert(ctx: Any, target: Any, args: Sequence[Any], kwargs: Any, layer_name: str) -> tuple[Any, ...]:
        from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

        x, size, taps, place, numbers, text, assign = args
        kernel = KERNELS[name]
        method, attributes = describe(name, place, numbers, text, assign)
        if kernel.merges and size is None:
            size = torch.ones(x.shape[0], place[0])
        given = [x, *([size] if kernel.merges else []), *taps]
        tensors = [get_trt_tensor(ctx, value, f"{layer_name}_input_{i}") for i, value in enumerate(given)]
        creator = trt.get_plugin_registry().get_creator(op_type(method), PLUGIN_VERSION, PLUGIN_NAMESPACE)
        fields = trt.PluginFieldCollection([field(trt, key, value) for key, value in attributes.items()])
        layer = ctx.net.add_plugin_v3(tensors, [], creator.create_plugin(layer_name, fields, trt.TensorRTPhase.BUILD))
        results = dict(zip(attributes["outputs"].split(","), (layer.get_output(i) for i in range(layer.num_outputs))))
        return tuple(results.get(key) for key in ("x", "index", "size", "assign"))

    return convert


def describe(
    name: str, place: Sequence[int], numbers: Sequence[float], text: Sequence[int], assign: bool
) -> tuple[str, dict[str, Any]]:
    """The method of an op's call and the attributes of its plugin."""
    kernel = KERNELS[name]
    recipe, options = kernel.options(numbers)
    if kernel.text:
        options = {**options, "text_pivots": text[0] if text else 0}
    sizes = ["size"] if kernel.merges else []
    out: dict[str, Any] = dict(zip(("n", "k", "unit", "start", "tap_start"), place))
    # what depends on the block is in the numbers already
    out |= {"prefix": place[3] // place[2], "block": 0, "depth": 1, "method": recipe.name}
    out |= {"inputs": ",".join(["x", *sizes, *kernel.taps]), "outputs": ",".join(["x", "index", *sizes, *["assign"] * assign])}
    out |= {"text": list(text[1:]) or [0]} if kernel.text else {}
    return recipe.name, {**out, **{f"option_{key}": value for key, value in recipe.with_options(options).items()}}


def field(trt: Any, name: str, value: Any) -> Any:
    """One attribute as TensorRT takes it."""
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array(value, np.int32).reshape(-1), trt.PluginFieldType.INT32)
