"""The flat graph as a program that torch.onnx takes: it is a graph of ATen ops already, so only its modules are traced."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from tokcompile.errors import ExportError, describe
from tokcompile.exports.decompose import decomposed
from tokcompile.exports.inline import inline
from tokcompile.passes.graph import fake_attr, fake_mode, get_attr
from tokcompile.passes.memory import mutates


def exported(gm: GraphModule, inputs: Sequence[Tensor]) -> ExportedProgram:
    """A program over the inputs that does what the graph does, whose nodes all know the shapes of their results.

    A graph that writes into its tensors is traced, which is how torch takes that out.

    Raises: ExportError where it calls other graphs (torch.cond).
    """
    if any(map(mutates, gm.graph.nodes)):
        return torch.export.export(gm, tuple(inputs), strict=False)
    return Lifted(gm).program(inputs)


class Lifted:
    """A copy of the graph with its tensors as inputs, as torch.export has them, and ops in place of the modules it calls."""

    def __init__(self, gm: GraphModule):
        self.gm, self.graph = gm, Graph()
        self.mode = fake_mode(gm.graph)
        self.tensors: dict[str, Tensor] = {}
        self.lifted: dict[int, Node] = {}  # by the tensor: one that has two names is one input
        self.specs: list[InputSpec] = []
        self.last = self.graph._root  # of the inputs, or the beginning

    def program(self, inputs: Sequence[Tensor]) -> ExportedProgram:
        given = iter(inputs)
        done: dict[Node, Any] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                done[node] = self.input(node.name, next(given), InputKind.USER_INPUT)
            elif node.op == "get_attr":
                value = get_attr(self.gm, node.target)
                if not isinstance(value, Tensor):
                    place = describe(next(iter(node.users)))
                    raise ExportError(f"the model chooses what it runs while it runs, and a file is one graph\n{place}")
                done[node] = self.tensor(value, node.target)
            elif node.op == "output":
                return self.finished(map_arg(node.args[0], done.__getitem__))
            else:
                done[node] = self.copied(node, done)
        raise AssertionError("a graph without an output")

    def copied(self, node: Node, done: dict[Node, Any]) -> Any:
        """What stands for the results of a call."""
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            args, kwargs = map_arg((node.args, node.kwargs), done.__getitem__)
            return inline(self.graph, self.mode, module, args, kwargs, self.tensor, pre_dispatch=True)
        if node.target is operator.getitem and not isinstance(done[node.args[0]], Node):
            return done[node.args[0]][node.args[1]]
        return self.graph.node_copy(node, done.__getitem__)

    def tensor(self, value: Tensor, name: str = "") -> Node:
        """The input that stands for a tensor of the model."""
        if id(value) not in self.lifted:
            name = name or f"tokcompile_constant_{len(self.lifted)}"
            self.tensors[name] = value
            kind = InputKind.PARAMETER if isinstance(value, nn.Parameter) else InputKind.BUFFER
            self.lifted[id(value)] = self.input(f"p_{name.replace('.', '_')}", value, kind, name)
        return self.lifted[id(value)]

    def input(self, name: str, value: Tensor, kind: InputKind, target: str | None = None) -> Node:
        """Another input, behind those there are."""
        with self.graph.inserting_after(self.last):
            node = self.last = self.graph.placeholder(name)
        node.meta["val"] = fake_attr(self.mode, value)
        persistent = True if kind is InputKind.BUFFER else None
        self.specs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
        return node

    def finished(self, outputs: Sequence[Node]) -> ExportedProgram:
        self.graph.output(tuple(outputs))
        results = [TensorArgument(n.name) for n in outputs]
        signature = ExportGraphSignature(self.specs, [OutputSpec(OutputKind.USER_OUTPUT, r, None) for r in results])
        given = [spec.arg for spec in self.specs if spec.kind is InputKind.USER_INPUT]
        trees = pytree.tree_structure((tuple(given), {})), pytree.tree_structure(tuple(results))
        call = ModuleCallEntry("", ModuleCallSignature(list(given), list(results), *trees))
        program = ExportedProgram(nn.Module(), self.graph, signature, self.tensors, {}, [call])
        return decomposed(program, self.tensor)
