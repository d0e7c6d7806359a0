"""fp16 and bf16: an optimized float32 program rewritten so that weights and activations are half precision.

It is a rewrite of the graph, as TensorRT's networks are strongly typed and take the precisions from it; onnxruntime and
torch run the same program, so what was converted can be compared with what it came from. Inputs and outputs keep their
float32: the engine is called like the model, and the casts at its ends are part of it.

What stays float32 inside:
- `FLOAT32` ops: norms, softmax, powers, means, sums, exponentials and roots overflow or lose the small terms in half
  precision; norms and softmax give half precision again (`ROUNDED`), the others are float32 until the next product;
- convolutions in bf16, which ONNX has from opset 22 on only;
- scores and similarities inside reductions, which are computed in float32 whatever the tokens are, and sizes of tokens;
- integers, booleans and float64.
Numbers beyond half precision (float32's lowest value in masks) become the largest finite one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from tokcompile.errors import ExportError
from tokcompile.passes.graph import Builder, device_of, fake_attr, fake_mode, finished, get_attr, packet, without_dead_code
from tokcompile.passes.reduction import ReductionModule

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp16": 2e-2, "bf16": 1e-1}  # of the relative error in onnxruntime, as for models that are half themselves

ROUNDED = frozenset(
    f"aten.{name}"
    for name in (
        "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "batch_norm", "group_norm", "native_group_norm",
        "_native_batch_norm_legit_no_training", "instance_norm", "softmax", "_softmax", "_safe_softmax", "special_softmax",
        "log_softmax", "_log_softmax",
    )
)  # fmt: skip
FLOAT32 = ROUNDED | frozenset(
    f"aten.{name}"
    for name in (
        "pow", "square", "mean", "sum", "cumsum", "cumprod", "prod", "var", "std", "var_mean", "norm", "linalg_vector_norm",
        "exp", "exp2", "expm1", "log", "log1p", "log2", "logsumexp", "sqrt", "rsqrt", "reciprocal", "cosh", "sinh",
        "view_as_complex",
    )
)  # fmt: skip
# products: the work itself, always in half precision
PRODUCTS = frozenset(
    f"aten.{name}"
    for name in (
        "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "einsum", "scaled_dot_product_attention",
        "bilinear", "prelu",
    )
)  # fmt: skip
CONVOLUTIONS = frozenset(
    f"aten.{name}"
    for name in (
        "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    )
)  # fmt: skip
CASTS = frozenset({"aten.to", "aten._to_copy", "aten.type_as", "aten.float"})


def default_tolerance(precision: str | None) -> float | None:
    return TOLERANCES.get(precision or "")


def convert(opt: OptimizedModel, precision: str | None) -> OptimizedModel:
    """The same model with its insides in that precision; the model itself for None and for what it has already.

    Raises: ExportError for a precision that is none, and for models that are not float32 or are quantized.
    """
    if precision is None:
        return opt
    if precision not in PRECISIONS:
        raise ExportError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}; None leaves the model as it is")
    check_convertible(opt, precision)
    if precision == "fp32":
        return opt
    return opt.over(Converter(opt.graph_module, PRECISIONS[precision]).run())


def check_convertible(opt: OptimizedModel, precision: str) -> None:
    """Raises: ExportError where there is nothing in float32, or where a model says its precisions itself."""
    found = {v.dtype for v in opt.graph_module.state_dict().values() if v.is_floating_point()}
    halves = found & {torch.float16, torch.bfloat16}
    if halves:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in halves))
        raise ExportError(
            f"precision={precision!r} converts float32 models, and this one has {names} weights\n"
            "  what to do: precision=None exports it as it is; or convert the model itself before tokcompile.optimize"
        )
    for node in opt.graph_module.graph.nodes:
        if precision != "fp32" and ("quantize_per" in packet(node)):
            raise ExportError(
                f"precision={precision!r} and the quantized model's {packet(node)} contradict each other: its Q/DQ nodes say "
                "the precisions\n  what to do: precision=None, and quantize a half precision model if the rest is to be half"
            )


class Converter:
    """Writes the graph anew; every float32 value of it becomes a half precision or a float32 one."""

    def __init__(self, gm: GraphModule, half: torch.dtype):
        root = torch.nn.Module()
        for name, value in gm.__dict__.items():  # the same weights, in dictionaries of its own
            root.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        self.gm, self.half, self.builder = gm, half, Builder(root, fake_mode(gm.graph), device_of(gm.graph))
        self.env: dict[Node, Node] = {}
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.weights: dict[str, str] = {}

    def run(self) -> GraphModule:
        for node in self.gm.graph.nodes:
            self.builder.origin = node
            self.env[node] = getattr(self, f"on_{node.op}")(node)
        return finished(without_dead_code(self.builder.root, self.builder.graph)).eval()

    def on_placeholder(self, node: Node) -> Node:
        new = self.builder.copy(node, self.env.__getitem__)
        return self.cast(new, self.half) if dtype_of(node) == torch.float32 else new

    def on_get_attr(self, node: Node) -> Node:
        """A weight stays float32 until its reader is known: a cast of a weight is done once, here."""
        new = self.builder.graph.get_attr(node.target)
        new.meta["val"] = fake_attr(self.builder.mode, get_attr(self.gm, node.target))
        return new

    def on_call_module(self, node: Node) -> Node:
        """A reduction: its tokens and taps are half precision, its sizes are float32."""
        module = get_attr(self.gm, node.target)
        assert isinstance(module, ReductionModule)
        size_at = 1
        args = [
            a if a is None else self.cast(self.env[a], torch.float32 if i == size_at else self.half)
            for i, a in enumerate(node.args)
        ]
        return self.builder.emit(node.target, *args)

    def on_call_function(self, node: Node) -> Any:
        name = packet(node)
        if name in CASTS:
            return self.on_cast(node)
        convolution = name in CONVOLUTIONS
        if name in FLOAT32 or (convolution and self.half == torch.bfloat16):
            new = self.emit(node, torch.float32)
            return self.round(new) if name in ROUNDED or convolution else new
        if name in PRODUCTS or convolution:
            return self.emit(node, self.half)
        return self.emit(node, self.widest(node))

    def on_cast(self, node: Node) -> Node:
        """A cast to float32 of what is float32 or half already is none; integers become float32, as positions need it."""
        source = self.env[node.args[0]]
        here = dtype_of(source) in (torch.float32, self.half)
        return source if here and dtype_of(node) == torch.float32 else self.emit(node, None)

    def on_output(self, node: Node) -> Node:
        """Outputs have the dtypes that they had."""

        def restore(value: Any) -> Any:
            if not isinstance(value, Node):
                return value
            return self.cast(self.env[value], torch.float32) if dtype_of(value) == torch.float32 else self.env[value]

        return self.builder.graph.output(map_aggregate(node.args[0], restore))

    def widest(self, node: Node) -> torch.dtype | None:
        """float32 where any operand that was computed is: weights and constants follow; None for a constant."""
        computed = [self.env[n] for n in node.all_input_nodes if self.env[n].all_input_nodes]
        if not computed:
            return None
        return torch.float32 if any(dtype_of(n) == torch.float32 for n in computed) else self.half

    def emit(self, node: Node, wanted: torch.dtype | None) -> Node:
        """The same call with its float operands in the wanted dtype."""

        def read(value: Any) -> Any:
            if isinstance(value, Node):
                new = self.env[value]
                return new if wanted is None else self.cast(new, wanted)
            if value is torch.float32 and wanted is not None:
                return wanted
            if isinstance(value, float) and wanted not in (None, torch.float32):
                return finite(value, self.half)
            return value

        args, kwargs = map_aggregate((node.args, node.kwargs), read)
        return self.builder.emit(node.target, *args, **kwargs)

    def round(self, new: Node) -> Any:
        """A single result in half precision; several are left as they are."""
        return self.cast(new, self.half) if isinstance(new.meta["val"], Tensor) else new

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        """The value in that dtype if it is a float32 or half precision one; written once."""
        now = dtype_of(value)
        if now not in (torch.float32, self.half) or now == dtype:
            return value
        if (value, dtype) not in self.casts:
            to = torch.ops.aten.to.dtype
            made = self.weight(value) if value.op == "get_attr" else self.builder.emit(to, value, dtype)
            self.casts[value, dtype] = made
        return self.casts[value, dtype]

    def weight(self, value: Node) -> Node:
        """A half precision copy of a weight, which any number of readers share."""
        target = str(value.target)
        if target not in self.weights:
            source = get_attr(self.gm, target).detach()
            limit = torch.finfo(self.half).max
            name = self.weights[target] = f"_half_{len(self.weights)}"
            # a mask's -inf stays what it is; finite numbers stay finite
            half = torch.where(source.isinf(), source, source.clamp(-limit, limit)).to(self.half)
            self.builder.root.register_buffer(name, half)
        return self.builder.attr(self.weights[target])


def finite(value: float, dtype: torch.dtype) -> float:
    """The number, or the largest finite one of the dtype where it lies beyond; infinities stay."""
    limit = torch.finfo(dtype).max
    return value if value in (float("inf"), float("-inf")) or value != value else max(-limit, min(limit, value))


def dtype_of(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None
