"""A model on the CPU, which is where the ONNX exporter makes its values and where onnxruntime's answers are compared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel

CPU = torch.device("cpu")


def on_cpu(opt: OptimizedModel) -> OptimizedModel:
    """The same model with its weights, constants and example inputs on the CPU; the model itself where they are there."""
    gm = opt.graph_module
    given = [*gm.parameters(), *gm.buffers(), *(v for v in opt.example_inputs if isinstance(v, Tensor))]
    if not any(map(elsewhere, [*(v.device for v in given), *named(gm)])):
        return opt
    out = opt.over(moved(gm))
    out.example_inputs = [v.cpu() if isinstance(v, Tensor) else v for v in opt.example_inputs]
    return out


def elsewhere(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")  # on meta there is nothing to move


def named(gm: GraphModule) -> list[torch.device]:
    """The devices that nodes name."""
    found: list[torch.device] = []
    for node in gm.graph.nodes:
        map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, torch.device) else None)
    return found


def moved(gm: GraphModule) -> GraphModule:
    """A copy of the graph over copies of what it reads; what two names share, they share in the copy too."""
    memo: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor) and elsewhere(value.device):
            if id(value) not in memo:
                here = value.detach().cpu()
                memo[id(value)] = (
                    torch.nn.Parameter(here, value.requires_grad) if isinstance(value, torch.nn.Parameter) else here
                )
            return memo[id(value)]
        if isinstance(value, torch.nn.Module) and any(elsewhere(v.device) for v in value.state_dict().values()):
            return copy.deepcopy(value).cpu()
        return value

    root = torch.nn.Module()
    for name, value in gm.__dict__.items():
        root.__dict__[name] = {key: move(v) for key, v in value.items()} if isinstance(value, dict) else move(value)
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda v: CPU if isinstance(v, torch.device) and elsewhere(v) else v
        )
    return GraphModule(root, graph).eval()
