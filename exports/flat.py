"""The graph that goes to torch.onnx: flat tensors in and out, each reduction one symbolic node."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tokcompile.exports.complex_views import real_views
from tokcompile.exports.index_adds import plain_adds
from tokcompile.exports.names import output_names, unique
from tokcompile.passes.causal import write_causal_masks
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins.contract import DOMAIN, DOMAIN_VERSION, OUTPUTS, ReductionNode, reduction_node

if TYPE_CHECKING:
    from tokcompile.api import OptimizedModel


@dataclass
class Reduction:
    """One reduction of the model, with fake values of its arguments and results."""

    module: ReductionModule
    node: ReductionNode
    inputs: list[Tensor]
    outputs: list[Tensor]


class Symbol(nn.Module):
    """Stands where a ReductionModule stood, and becomes one ONNX node."""

    def __init__(self, reduction: Reduction, number: int):
        super().__init__()
        self.reduction, self.number = reduction, number

    def forward(self, x: Tensor, size: Tensor | None = None, *taps: Tensor) -> tuple[Tensor | None, ...]:
        r = self.reduction
        if "size" not in r.node.inputs:
            inputs = [x, *taps]
        else:
            inputs = [x, torch.ones(x.shape[0], r.module.site.n) if size is None else size, *taps]
        # only the number, by which the node is found again: its attributes are written once its function is known
        results = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::Reduction", inputs, {"number": self.number}, dtypes=[o.dtype for o in r.outputs],
            shapes=[list(o.shape) for o in r.outputs], version=DOMAIN_VERSION,
        )  # fmt: skip
        named = dict(zip(r.node.outputs, results, strict=True))
        return tuple(named.get(name) for name in OUTPUTS)


class Body(nn.Module):
    """A ReductionModule over its ONNX inputs, giving only the results that there are."""

    def __init__(self, reduction: Reduction):
        super().__init__()
        self.module, self.names = reduction.module, reduction.node.inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        results = self.module(given["x"], given.get("size"), *(given[name] for name in self.module.names))
        return tuple(r.clone() for r in results if r is not None)  # a result may be an input or another result


@dataclass
class Flat:
    """A graph over `inputs`, the tensors among the caller's flat arguments; reductions in the order of their numbers.

    After them it takes the inputs of every reduction's body, and after its outputs gives theirs: the fixed cost of
    torch.onnx.export is far above that of a body, so all are traced in one go and taken apart afterwards.
    """

    gm: GraphModule
    inputs: list[Tensor]
    input_names: list[str]
    output_names: list[str]
    kept_outputs: list[int]
    reductions: list[Reduction]


def flatten(opt: OptimizedModel) -> Flat:
    """A copy of the optimized graph with symbols for reductions and without inputs and outputs that are no tensors."""
    source = opt.graph_module
    gm = GraphModule(source, copy.deepcopy(source.graph))
    reductions = []
    for node in gm.graph.nodes:
        module = source.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, ReductionModule):
            reductions.append(describe(node, module))
            gm.add_module(node.target, Symbol(reductions[-1], len(reductions) - 1))
    inputs, names = [], []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), opt.example_inputs, strict=True):
        if isinstance(value, Tensor):
            inputs.append(value)
            names.append(node.name)
        else:
            replace_constant(node, value)
            gm.graph.erase_node(node)
    out = gm.graph.output_node()
    kept = [i for i, value in enumerate(out.args[0]) if isinstance(value, Node)]
    named = unique([*output_names(opt), *opt.extra_outputs])
    out.args = (tuple(out.args[0][i] for i in kept),)
    add_bodies(gm, reductions)
    plain_adds(gm)
    write_causal_masks(gm)
    real_views(gm)
    gm.recompile()
    return Flat(gm, inputs, names, [named[i] for i in kept], kept, reductions)


def add_bodies(gm: GraphModule, reductions: Sequence[Reduction]) -> None:
    """The bodies as further modules beside the model, with placeholders and outputs of their own."""
    graph, out = gm.graph, gm.graph.output_node()
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    results: list[Node] = []
    for i, r in enumerate(reductions):
        gm.add_module(f"tokcompile_body_{i}", Body(r))
        given: list[Node] = []
        for name in r.node.inputs:
            with graph.inserting_after(last):
                last = graph.placeholder(f"tokcompile_body_{i}_{name}")
            given.append(last)
        with graph.inserting_before(out):
            call = graph.call_module(f"tokcompile_body_{i}", tuple(given))
            results += [graph.call_function(operator.getitem, (call, j)) for j in range(len(r.outputs))]
    out.args = ((*out.args[0], *results),)


def replace_constant(node: Node, value: Any) -> None:
    """Writes a constant argument of the caller into the nodes that read it."""
    for user in list(node.users):
        user.args = torch.fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def describe(node: Node, module: ReductionModule) -> Reduction:
    """The reduction that a call_module node stands for."""
    given = {name: v for name, v in zip(OUTPUTS, node.meta["val"]) if v is not None}
    if not module.needs_assign:
        given.pop("assign", None)
    contract = reduction_node(module, tuple(given))
    x, size, *taps = [getattr(a, "meta", {}).get("val") for a in [*node.args, None][: max(len(node.args), 2)]]
    assert x is not None
    named: dict[str, Any] = dict(zip(module.names, taps, strict=True))
    named |= {"x": x, "size": torch.empty(len(x), module.site.n) if size is None else size}
    return Reduction(module, contract, [named[name] for name in contract.inputs], list(given.values()))
