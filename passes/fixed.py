"""Fixed values: what a graph computes from the example inputs, made static with a check on later calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import InputError
from tokcompile.passes.graph import get_attr
from tokcompile.passes.memory import ancestors_of


@dataclass(frozen=True)
class Fixed:
    """Positions that were fixed: `program` computes them from the flat inputs, `value` is what it has to give, `guard` says
    what they are."""

    program: GraphModule
    value: Tensor
    guard: str

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError where these inputs have them elsewhere."""
        found = computed_by(self.program, inputs)
        if not torch.equal(found.expand(self.value.shape).to(self.value.device), self.value):
            raise InputError(
                f"these inputs have tokens at other positions than the example, in which {self.guard}: positions are static, "
                "optimize once per layout"
            )


def read_by(program: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Those of the inputs that it depends on."""
    return [v for n, v in zip(program.graph.find_nodes(op="placeholder"), inputs) if n.users]


def value_of(program: GraphModule, inputs: Sequence[Any]) -> Tensor | None:
    """What it gives for these inputs; None where it would need weights or inputs that are not there."""
    if any(absent(v) for v in [*read_by(program, inputs), *constants_of(program)]):
        return None
    with torch.no_grad():
        value = computed_by(program, inputs)
    return value.detach().cpu() if isinstance(value, Tensor) else None


def constants_of(program: GraphModule) -> list[Any]:
    return [get_attr(program, n.target) for n in program.graph.find_nodes(op="get_attr")]


def computed_by(program: GraphModule, inputs: Sequence[Any]) -> Any:
    """What a program gives for these inputs. Its constants are where the example was, also when the model has been moved since,
    so that inputs go there."""
    devices = {v.device for v in constants_of(program) if isinstance(v, Tensor)}
    devices |= {n.kwargs["device"] for n in program.graph.nodes if n.kwargs.get("device") is not None}
    if len(devices) == 1:
        (device,) = devices
        placeholders = program.graph.find_nodes(op="placeholder")
        inputs = [v.to(device) if n.users and isinstance(v, Tensor) else v for n, v in zip(placeholders, inputs)]
    return program(*inputs)


def absent(value: Any) -> bool:
    """Whether a tensor has a shape but no data."""
    return isinstance(value, Tensor) and (value.is_meta or type(value) not in (Tensor, torch.nn.Parameter))


def program_of(gm: GraphModule, node: Node) -> GraphModule:
    """The graph that computes one node from the flat inputs."""
    wanted = ancestors_of({node})
    graph = Graph()
    env: dict[Node, Node] = {}
    for n in gm.graph.nodes:
        if n in wanted or n.op == "placeholder":
            env[n] = graph.node_copy(n, env.__getitem__)
            if env[n].kwargs.get("device") == torch.device("meta"):  # what no weight goes into can be computed all the same
                env[n].update_kwarg("device", torch.device("cpu"))
    graph.output(env[node])
    return GraphModule(gm, graph)
