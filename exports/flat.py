"""The graph that goes to torch.onnx: flat tensors in and out, each reduction one symbolic node."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

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
        named = dict(zip(r.node.outputs, results))
        return tuple(named.get(name) for name in OUTPUTS)


class Bodies(nn.Module):
    """All ReductionModules side by side over their ONNX inputs, giving only the results that there are.

    They are traced in one go: the fixed cost of torch.onnx.export is far above that of one body.
    """

    def __init__(self, reductions: Sequence[Reduction]):
        super().__init__()
        self.reductions = reductions

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rest, results = iter(inputs), []
        for r in self.reductions:
            given = {name: next(rest) for name in r.node.inputs}
            taps = [given[name] for name in r.module.names]
            values = r.module(given["x"], given.get("size"), *taps)
            results += [v.clone() for v in values if v is not None]  # a result may be an input or another result
        return tuple(results)


@dataclass
class Flat:
    """A graph over `inputs`, the tensors among the caller's flat arguments; reductions in the order of their numbers."""

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
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), opt.example_inputs):
        if isinstance(value, Tensor):
            inputs.append(value)
            names.append(node.name)
        else:
            node.replace_all_uses_with(value) if not node.users else replace_constant(node, value)
            gm.graph.erase_node(node)
    out = gm.graph.output_node()
    kept = [i for i, value in enumerate(out.args[0]) if isinstance(value, Node)]
    named = unique([*output_names(opt), *opt.extra_outputs])
    out.args = (tuple(out.args[0][i] for i in kept),)
    gm.recompile()
    return Flat(gm, inputs, names, [named[i] for i in kept], kept, reductions)


def replace_constant(node: Node, value: Any) -> None:
    """Writes a constant argument of the caller into the nodes that read it."""
    for user in list(node.users):
        user.args = torch.fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def describe(node: Node, module: ReductionModule) -> Reduction:
    """The reduction that a call_module node stands for."""
    values = [v if name != "assign" or module.needs_assign else None for name, v in zip(OUTPUTS, node.meta["val"])]
    given = {name: v for name, v in zip(OUTPUTS, values) if v is not None}
    contract = reduction_node(module, tuple(given))
    x, size, *taps = [None if a is None else a.meta["val"] for a in [*node.args, None][: max(len(node.args), 2)]]
    named: Mapping[str, Any] = {
        "x": x, "size": torch.empty(x.shape[0], module.site.n) if size is None else size, **dict(zip(module.names, taps)),
    }  # fmt: skip
    return Reduction(module, contract, [named[name] for name in contract.inputs], list(given.values()))


def output_names(opt: OptimizedModel) -> list[str]:
    """The keys of a model output that has them, else the names that torch.onnx gives the original's outputs."""
    exported = opt.output_names[: len(opt.output_names) - len(opt.extra_outputs)]
    spec = opt._out_spec
    keys = named_leaves(spec)
    return [key or name or f"output_{i}" for i, (key, name) in enumerate(zip(keys, exported))]


def named_leaves(spec: pytree.TreeSpec, name: str = "") -> list[str]:
    """A name for each leaf, '' where no dictionary or model output names it; `hidden_states_0` inside a tuple."""
    if spec.is_leaf():
        return [name]
    keys = spec.context if isinstance(spec.context, (list, tuple)) else []
    if keys and isinstance(keys[-1], (list, tuple)):  # named tuples and some model outputs carry (type, keys)
        keys = keys[-1]
    if len(keys) != spec.num_children or not all(isinstance(k, str) for k in keys):
        keys = [str(i) if name else "" for i in range(spec.num_children)]
    out = []
    for i, key in enumerate(keys):
        out += named_leaves(spec.child(i), "_".join(filter(None, (name, key))))
    return out


def unique(names: list[str]) -> list[str]:
    """The same names, later ones numbered where they repeat."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out
