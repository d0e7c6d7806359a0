"""A batch of one is left out of what goes into reductions and comes out of them, as `batch_one` leaves it out elsewhere.

Only reshapes are written here, on both sides of each call; the rules that follow meet them and take them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokcompile.exports.flat import Reduction
from tokcompile.exports.rewriting import reshaped
from tokcompile.plugins.contract import DOMAIN


def flat_calls(model: ir.Model, reductions: Sequence[Reduction]) -> None:
    """Calls and bodies (see `Flat`) over tensors without their leading 1, where the batch is one."""
    graph = model.graph
    calls = {n.attributes["number"].as_int(): n for n in graph if n.domain == DOMAIN}
    end_in, end_out = len(graph.inputs), len(graph.outputs)
    first = next(iter(graph))
    for number, r in reversed(list(enumerate(reductions))):
        start_in, start_out = end_in - len(r.node.inputs), end_out - len(r.node.outputs)
        if all(v.shape[0] == 1 for v in [*r.inputs, *r.outputs]):
            call = calls[number]
            for i, value in enumerate(call.inputs):
                assert value is not None
                call.replace_input_with(i, resized(graph, call, value, r.inputs[i].shape[1:]))
            for output, result in zip(call.outputs, r.outputs):
                widen(graph, call, output, result.shape)
            for value, given in zip(graph.inputs[start_in:end_in], r.inputs):
                widen(graph, first, value, given.shape, after=False)
            for i, given in zip(range(start_out, end_out), r.outputs):
                value, made = graph.outputs[i], graph.outputs[i].producer()
                # where all even tokens merge, the kept ones are a constant
                graph.outputs[i] = resized(graph, made or first, value, given.shape[1:], after=made is not None)
        end_in, end_out = start_in, start_out


def resized(graph: ir.Graph, at: ir.Node, value: ir.Value, shape: Sequence[int], after: bool = False) -> ir.Value:
    """The value in another shape, by which it is named."""
    return reshaped(graph, at, value, shape, f"{value.name}.{'x'.join(map(str, shape))}", after)


def widen(graph: ir.Graph, at: ir.Node, value: ir.Value, shape: Sequence[int], after: bool = True) -> None:
    """Makes a value one without its leading 1; those that read it get it back in its old shape."""
    users = list(value.uses())
    value.shape = ir.Shape(shape[1:])
    wide = resized(graph, at, value, shape, after)
    for node, i in users:
        node.replace_input_with(i, wide)
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = wide
