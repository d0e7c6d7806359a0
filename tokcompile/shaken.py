"""Shaken: a copy of a traced model whose parameters hide nothing, and how exactly its outputs can be compared.

Zero-initialised tables and tiny layer scales would hide a missing step, so they are moved first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from tokcompile.compiler import Analysis, understand
from tokcompile.errors import InputError, TokcompileError
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.graph import copy_graph, get_attr
from tokcompile.passes.trace import Traced

ROUNDING = 2e-2  # between a model's own kernels and those of its traced form, after many layers
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def prepare(traced: Traced, seed: int) -> tuple[Analysis, list[Any]]:
    """The analysed graph over shaken parameters, and its outputs; shaken less where they would not be finite.

    Raises: InputError where they never are.
    """
    original = traced.gm
    for strength in (1.0, 0.3, 0.1):
        traced.gm = shaken(original, seed, strength)
        analysis = understand(traced, canonicalise(traced.gm, traced.inputs), {})
        outputs = run(analysis.graph, traced.inputs)
        if not analysis.structure.blocks or all(map(comparable, floats(outputs))):
            return analysis, outputs
    raise InputError("with shaken parameters the model gives NaN or Inf on these inputs: nothing can be compared")


def comparable(output: Tensor) -> bool:
    """Whether there are numbers to compare: infinities may stand among them (detectors write them for absent words)."""
    return not output.numel() or bool(torch.isfinite(output).any() and not torch.isnan(output).any())


def shaken(gm: GraphModule, seed: int, strength: float = 1.0) -> GraphModule:
    """The same graph over perturbed copies of its parameters (weights about their fan-in, vectors and tables about 0.4)."""
    gm = copy_graph(gm)
    generator = torch.Generator().manual_seed(seed)
    new: dict[int, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        value = get_attr(gm, node.target)
        if isinstance(value, torch.nn.Parameter) and value.is_floating_point() and not value.is_meta:
            if id(value) not in new:
                table = value.dim() < 2 or value.shape[0] == 1
                scale = strength * (0.4 if table else 1.2 / max(value[0].numel(), 1) ** 0.5)
                noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
                new[id(value)] = torch.nn.Parameter(value.detach() + scale * noise, requires_grad=False)
            owner, _, name = node.target.rpartition(".")
            setattr(get_attr(gm, owner) if owner else gm, name, new[id(value)])
    return gm


def run(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return list(gm(*inputs))


def off_from_model(model: Any, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None, traced: Traced) -> float | None:
    """How far the traced graph is from what the model itself gives on the example, where it is further than rounding; else
    None, as for a program, a model without weights, and one that does not give the same twice."""
    if not isinstance(model, torch.nn.Module) or any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()):
        return None

    def own() -> list[Any]:
        given, named = copy.deepcopy((args or (), kwargs or {}))  # a cache among them grows
        with torch.no_grad():
            return pytree.tree_leaves(model(*given, **named))

    try:
        wanted = own()
        got = run(traced.gm, traced.inputs)
        if len(got) != len(wanted) or (off := worst(got, wanted)) <= ROUNDING:
            return None
        return off if worst(own(), wanted) <= ROUNDING else None
    except TokcompileError:  # other shapes: a cache that is given back whole, say
        return None


def noise_floor(gm: GraphModule, inputs: Sequence[Any], outputs: Sequence[Any], seed: int) -> float:
    """The tolerance: that of the dtype, or what rounding alone does in a model that amplifies small differences.

    Raises: InputError where the outputs do not depend on the inputs, so that nothing could be seen.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(share: float) -> list[Any]:
        return [
            v * (1 + share * torch.randn(v.shape, generator=generator).to(v))
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for v in inputs
        ]

    if floats(inputs) and worst(run(gm, moved(0.5)), outputs) == 0:
        raise InputError("with shaken parameters the outputs do not depend on the inputs: nothing can be compared")
    dtype = max((TOLERANCE.get(o.dtype, 1e-4) for o in floats(outputs)), default=1e-4)

    def noise() -> float:
        jittered = Jitter(gm, generator)
        with torch.no_grad():
            jittered.run(*inputs)
        return 10 * worst(jittered.outputs, outputs)

    if (first := noise()) <= dtype:
        return dtype
    return 2 * max(first, *(noise() for _ in range(4)))  # one draw says little about a model that amplifies


class Jitter(Interpreter):
    """Runs a graph with every floating point value off by about one rounding error."""

    def __init__(self, gm: GraphModule, generator: torch.Generator):
        super().__init__(gm)
        self.generator = generator
        self.outputs: list[Any] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            self.outputs = list(value)
        elif n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=self.generator).to(value)
            value = value * (1 + torch.finfo(value.dtype).eps * noise)
        return value


def floats(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def worst(got: Sequence[Any], want: Sequence[Any]) -> float:
    """The largest difference, relative to the largest entry of that output."""
    out = 0.0
    for a, b in zip(got, want):
        if isinstance(a, Tensor) and a.is_floating_point():
            if a.shape != b.shape:
                raise TokcompileError(f"an output changed its shape from {tuple(b.shape)} to {tuple(a.shape)}")
            difference = (a.double() - b.double()).abs()
            difference = difference[~(torch.isinf(a) & torch.isinf(b))]
            if difference.numel():
                finite = b[torch.isfinite(b)].double()
                value = (difference.max() / finite.abs().max().clamp_min(1e-6)).item() if finite.numel() else float("nan")
                out = max(out, value) if value == value else float("inf")
    return out
