"""Placeholders: where a prompt says "image here", features are joined in between the text instead of scattered over it.

A vision-language model writes image features over the embeddings of placeholder ids: masked_scatter, or an assignment at
positions. Which positions these are follows from the example inputs and is fixed. As a concatenation of text, features and
text, the prompt gets shorter with its features, and the passes know where the visual tokens are. An order of all tokens
that follows from sizes among the inputs is fixed likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import InputError
from tokcompile.passes.graph import aten, bind, get_attr, packet, shape
from tokcompile.passes.memory import ancestors_of

Spans = tuple[tuple[int, int], ...]
SPANS = "placeholder_spans"  # the key in a node's meta
SAMPLES = "samples"  # the key of a view that gives each sample of the batch its features
WRITES = {"aten.masked_scatter", "aten.index_put"}


@dataclass(frozen=True)
class Fixed:
    """Positions that were fixed: `program` computes them from the flat inputs, `value` is what it has to give, `guard` says
    what they are."""

    program: GraphModule
    value: Tensor
    guard: str

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError where these inputs have them elsewhere."""
        if not torch.equal(self.program(*inputs).expand(self.value.shape).to(self.value.device), self.value):
            raise InputError(
                f"these inputs have tokens at other positions than the example, in which {self.guard}: positions are static, "
                "optimize once per layout"
            )


def placeholders_at(spans: Spans) -> str:
    return f"the prompt holds image features at positions {', '.join(f'{a} to {b}' for a, b in spans)}"


def fix_placeholders(gm: GraphModule, inputs: Sequence[Any]) -> list[Fixed]:
    """Turns writes of features at fixed positions, and reads from such, into cat and slice, in place; orders into constants.

    A write that is no run of positions common to all rows of the batch stays what it is.
    """
    fixed = []
    for node in list(gm.graph.nodes):
        masked = write_by_mask(node)
        if masked is not None:
            base, mask_node, features = masked
            program = program_of(gm, mask_node)
            mask = value_of(program, inputs)
            spans = None if mask is None else spans_of_mask(as_rows(mask, node), shape(node))
            if mask is not None and spans and numel(features) == written(spans, shape(node)):
                joined(gm, node, base, features, spans)
                if read_by(program, inputs):
                    fixed.append(Fixed(program, mask, placeholders_at(spans)))
        elif (order := fix_order(gm, node, inputs)) is not None:
            fixed += order
        elif packet(node) in ("aten.index_put", "aten.index"):
            at_positions(gm, node, inputs)
    return fixed


def write_by_mask(node: Node) -> tuple[Node, Node, Node] | None:
    """(tensor, mask, features) of `x.masked_scatter(mask, features)` and of `x[mask] = features`; None for other ops."""
    if packet(node) == "aten.masked_scatter":
        base, mask, features = node.args
        return base, mask, features
    if packet(node) != "aten.index_put":
        return None
    a = bind(node)
    mask = a["indices"][0] if len(a["indices"]) == 1 else None
    if not isinstance(mask, Node) or mask.meta["val"].dtype is not torch.bool or shape(mask) != shape(node)[:-1]:
        return None
    return None if a["accumulate"] else (a["self"], mask, a["values"])


def as_rows(mask: Tensor, node: Node) -> Tensor:
    """A mask of tokens as one of their channels."""
    return mask.unsqueeze(-1) if mask.dim() == len(shape(node)) - 1 and packet(node) == "aten.index_put" else mask


def at_positions(gm: GraphModule, node: Node, inputs: Sequence[Any]) -> None:
    """`x[rows, positions]` and its assignment, where the index tensors are constants that name whole runs."""
    a = bind(node)
    base, indices = a["self"], a["indices"]
    reads = packet(node) == "aten.index"
    if not isinstance(base, Node) or len(shape(base)) < 2 or (not reads and a["accumulate"]):
        return
    if len(indices) != len(shape(base)) - 1 or not all(isinstance(i, Node) for i in indices):
        return
    programs = [program_of(gm, i) for i in indices]
    positions = [None if read_by(one, inputs) else value_of(one, inputs) for one in programs]
    spans = spans_of_positions(positions, shape(base))
    if not spans:
        return
    if reads:
        taken(gm, node, base, spans)
    elif numel(a["values"]) == written(spans, shape(base)):
        joined(gm, node, base, a["values"], spans)


def fix_order(gm: GraphModule, node: Node, inputs: Sequence[Any]) -> list[Fixed] | None:
    """Writes an `x[order]` that takes all tokens as one by a plain constant, where the order follows from numbers among the
    inputs, as the sizes of images are, and has to be what it is. None for anything else."""
    if packet(node) != "aten.index" or len(bind(node)["indices"]) != 1:
        return None
    x, (index,) = bind(node)["self"], bind(node)["indices"]
    plain = index.op == "get_attr" and len(shape(index)) == 1
    if plain or x.op == "get_attr" or not 1 < numel(index) == shape(x)[0] or index.meta["val"].dtype is torch.bool:
        return None
    program = program_of(gm, index)
    read = read_by(program, inputs)
    if any(not isinstance(v, Tensor) or v.is_floating_point() for v in read):
        return None
    order, rows = value_of(program, inputs), numel(index)
    if order is None or not torch.equal(order.flatten().long().sort()[0], torch.arange(rows)):
        return None
    emit, name = emitter(gm, node), f"_order_of_{node.name}"
    gm.register_buffer(name, order.flatten().to(x.meta["val"].device))
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta["val"] = index.meta["val"].flatten()
    made = emit(aten.reshape.default, emit(aten.index.Tensor, x, [constant]), [*order.shape, *shape(x)[1:]])
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return [Fixed(program, order, f"all {rows} tokens are taken in an order of their own")] if read else []


def joined(gm: GraphModule, node: Node, base: Node, features: Node, spans: Spans) -> None:
    """`base` with `features` in the place of its tokens at `spans`."""
    sizes = shape(base)
    axis, lead = len(sizes) - 2, list(sizes[:-2])
    emit = emitter(gm, node)
    count = sum(stop - start for start, stop in spans)
    rows = emit(aten.reshape.default, features, [*lead, count, sizes[-1]])
    rows.meta[SAMPLES] = True
    pieces, at, done = [], 0, 0
    for start, stop in spans:
        if start > at:
            pieces.append(emit(aten.slice.Tensor, base, axis, at, start))
        whole = stop - start == count
        pieces.append(rows if whole else emit(aten.slice.Tensor, rows, axis, done, done + stop - start))
        at, done = stop, done + stop - start
    if at < sizes[axis]:
        pieces.append(emit(aten.slice.Tensor, base, axis, at, sizes[axis]))
    new = emit(aten.cat.default, pieces, axis)
    new.meta[SPANS] = spans
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def taken(gm: GraphModule, node: Node, base: Node, spans: Spans) -> None:
    """The tokens of `base` at `spans`, as rows (rows of the batch * tokens, D)."""
    sizes, emit = shape(base), emitter(gm, node)
    pieces = [emit(aten.slice.Tensor, base, len(sizes) - 2, start, stop) for start, stop in spans]
    rows = pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, len(sizes) - 2)
    count = sum(stop - start for start, stop in spans)
    new = emit(aten.reshape.default, rows, [prod(sizes[:-2]) * count, sizes[-1]])
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def emitter(gm: GraphModule, origin: Node) -> Any:
    """Adds calls before `origin` that inherit its place in the model."""

    def emit(target: Any, *args: Any) -> Node:
        with gm.graph.inserting_before(origin):
            new = gm.graph.call_function(target, args)
        new.meta = {k: v for k, v in origin.meta.items() if k != "val"}
        return new

    return emit


def spans_of_mask(mask: Tensor, sizes: tuple[int, ...]) -> Spans | None:
    """The runs of True along the token axis, where all channels and all rows agree."""
    full = mask.expand(sizes)
    rows = full.any(-1)
    if not torch.equal(rows, full.all(-1)):
        return None
    rows = rows.reshape(-1, sizes[-2])
    return runs(rows[0]) if bool((rows == rows[0]).all()) else None


def spans_of_positions(positions: Sequence[Tensor | None], sizes: tuple[int, ...]) -> Spans | None:
    """The runs that index tensors (one per leading axis) name, where they name them row by row, the same in each."""
    if any(p is None or p.dim() != 1 or p.dtype not in (torch.int64, torch.int32) for p in positions):
        return None
    mask = torch.zeros(sizes[:-1], dtype=torch.bool)
    if any(bool((p < 0).any() | (p >= size).any()) for p, size in zip(positions, sizes) if p is not None):
        return None
    mask[tuple(p.long() for p in positions if p is not None)] = True
    named = mask.nonzero(as_tuple=True)
    if any(p is not None and not torch.equal(p.long(), n) for p, n in zip(positions, named)):
        return None
    return spans_of_mask(mask.unsqueeze(-1), (*sizes[:-1], 1))


def runs(row: Tensor) -> Spans:
    edges = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return tuple(zip(starts, stops))


def written(spans: Spans, sizes: tuple[int, ...]) -> int:
    return sum(stop - start for start, stop in spans) * prod(sizes[:-2]) * sizes[-1]


def numel(node: Node) -> int:
    return prod(shape(node))


def read_by(program: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Those of the inputs that it depends on."""
    return [v for n, v in zip(program.graph.find_nodes(op="placeholder"), inputs) if n.users]


def value_of(program: GraphModule, inputs: Sequence[Any]) -> Tensor | None:
    """What it gives on the example inputs; None where it would need weights or inputs that are not there."""
    attributes = [get_attr(program, n.target) for n in program.graph.find_nodes(op="get_attr")]
    if any(absent(v) for v in [*read_by(program, inputs), *attributes]):
        return None
    with torch.no_grad():
        value = program(*inputs)
    return value.detach().cpu() if isinstance(value, Tensor) else None


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
