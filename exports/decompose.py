"""The ops that ONNX does not have, written as ops that it has, each where it stands.

torch.onnx.export would trace the whole program once more for them, which takes longer than anything else that it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from tokcompile.exports.inline import inline
from tokcompile.passes.graph import fake_mode, replace_results

Table = Mapping[Any, Callable[..., Any]]


def decomposed(program: ExportedProgram, constant: Callable[[Tensor], Node]) -> ExportedProgram:
    """The program, whose `run_decompositions`, which torch.onnx.export calls, is this one.

    constant: makes a tensor an input of the program.
    """

    def run_decompositions(table: Table) -> ExportedProgram:
        decompose(program.graph_module, table, constant)
        for spec, value in zip(program.graph_signature.output_specs, program.graph.output_node().args[0], strict=True):
            spec.arg.name = value.name
        return program

    program.run_decompositions = run_decompositions
    return program


def decompose(gm: GraphModule, table: Table, constant: Callable[[Tensor], Node]) -> None:
    """Replaces the calls of ops that have a decomposition in the table by what it computes for values of their shape."""
    mode, table = fake_mode(gm.graph), dict(table)
    for node in gm.graph.nodes:
        op = node.target
        if node.op == "call_function" and isinstance(op, OpOverload) and (op in table or composed(op)):
            with gm.graph.inserting_before(node):
                results = inline(gm.graph, mode, table.get(op, op), node.args, node.kwargs, constant, decomposition_table=table)
            replace_results(node, results)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def composed(op: OpOverload) -> bool:
    """Whether it is made of other ops and torch.export never keeps it; the table leaves out what ONNX has of the rest."""
    return op._can_decompose() and op not in kept_when_asked()


@functools.cache
def kept_when_asked() -> frozenset[Any]:
    return frozenset(torch.export.default_decompositions())
