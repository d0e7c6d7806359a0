"""Shaken: a copy of a traced model whose parameters hide nothing, and how exactly its outputs can be compared.

Zero-initialised tables and tiny layer scales would hide a missing step, so they are moved first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokcompile.compiler import Analysis, understand
from tokcompile.errors import InputError
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.faithful import TOLERANCE, worst
from tokcompile.passes.graph import copy_graph, get_attr
from tokcompile.passes.trace import Traced


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
        if isinstance(value, torch.nn.Parameter) and value.is_floating_point() and value.numel() and not value.is_meta:
            if id(value) not in new:
                table = value.dim() < 2 or value.shape[0] == 1
                scale = strength * (0.4 if table else 1.2 / value[0].numel() ** 0.5)
                noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
                new[id(value)] = torch.nn.Parameter(value.detach() + scale * noise, requires_grad=False)
            owner, _, name = node.target.rpartition(".")
            setattr(get_attr(gm, owner) if owner else gm, name, new[id(value)])
    return gm


def run(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return list(gm(*inputs))


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
    """Runs a graph with every floating point value off by about one rounding error, but for what is computed from whole numbers
    alone: masks, which are exact, and in which such an error would be multiplied by the largest number that there is."""

    def __init__(self, gm: GraphModule, generator: torch.Generator):
        super().__init__(gm)
        self.generator = generator
        self.outputs: list[Any] = []
        self.inexact: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            self.outputs = list(value)
        elif n.op != "call_function":
            self.inexact |= {n} if floats([value]) else set()
        elif any(i in self.inexact for i in n.all_input_nodes):
            self.inexact.add(n)
        if n.op == "call_function" and n in self.inexact and floats([value]):
            noise = torch.randn(value.shape, generator=self.generator).to(value)
            value = value * (1 + torch.finfo(value.dtype).eps * noise)
        return value


def floats(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
