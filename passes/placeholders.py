"""Placeholders: where a prompt says "image here", features are joined in between the text instead of scattered over it.

A vision-language model writes image features over the embeddings of placeholder ids: masked_scatter, or an assignment at
positions. Which positions these are follows from the example inputs and is fixed. As a concatenation of text, features and
text, the prompt gets shorter with its features, and the passes know where the visual tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokcompile.passes.fixed import Fixed, program_of, read_by, value_of
from tokcompile.passes.graph import aten, bind, emitter, numel, packet, shape, stand_in
from tokcompile.passes.memory import CASTS, ancestors_of

Spans = tuple[tuple[int, int], ...]
SPANS = "placeholder_spans"  # the key in a node's meta
APART = "placeholders_apart"  # the key of a write whose rows differ: how, in words
SAMPLES = "samples"  # the key of a view that gives each sample of the batch its features
WRITES = {"aten.masked_scatter", "aten.index_put"}
FILLS = ("aten.zeros_like", "aten.zeros", "aten.full")


def placeholders_at(spans: Spans) -> str:
    return f"the prompt holds image features at positions {', '.join(f'{a} to {b}' for a, b in spans)}"


def fix_placeholders(gm: GraphModule, inputs: Sequence[Any]) -> list[Fixed]:
    """Turns writes of features at fixed positions, and reads from such, into cat and slice, in place.

    A write that is no run of positions common to all rows of the batch stays what it is.
    """
    fixed = []
    parts: set[Node] = set()  # of a result that is put together from nothing, as by experts for text and others for images
    for node in list(gm.graph.nodes):
        masked = write_by_mask(node)
        if masked is not None:
            base, mask_node, features = masked
            if is_row(features, node):
                one_row(gm, node, base, mask_node, features)
                continue
            program = program_of(gm, mask_node)
            mask = value_of(program, inputs)
            spans = None if mask is None else spans_of_mask(as_rows(mask, node), shape(node))
            if mask is not None and spans is None:
                node.meta[APART] = apart(as_rows(mask, node), shape(node))
            if mask is not None and spans and numel(features) == written(spans, shape(node)):
                joined(gm, node, base, features, spans)
                if read_by(program, inputs):
                    fixed.append(Fixed(program, mask, placeholders_at(spans)))
        elif packet(node) in ("aten.index_put", "aten.index"):
            at_positions(gm, node, inputs, parts)
        elif node.target is aten.where.self:
            fixed += by_rank(gm, node, inputs)
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


def is_row(value: Node, node: Node) -> bool:
    """Whether what is assigned at a mask is a row of the model's own, such as the embedding of one word."""
    one = shape(value) in ((), (1,), shape(node)[-1:], (1, *shape(node)[-1:]))
    return packet(node) == "aten.index_put" and one and not from_inputs(value)


def from_inputs(node: Node) -> bool:
    return any(n.op == "placeholder" for n in ancestors_of({node}))


def one_row(gm: GraphModule, node: Node, base: Node, mask: Node, row: Node) -> None:
    """`x[mask] = row`, one for all places, chooses between the two at each."""
    emit = emitter(gm, node)
    new = emit(aten.where.self, emit(aten.unsqueeze.default, mask, -1), row, base)
    stand_in(node, new)


def at_positions(gm: GraphModule, node: Node, inputs: Sequence[Any], parts: set[Node]) -> None:
    """`x[rows, positions]` and its assignment, where the index tensors are constants that name whole runs; the same with all
    channels named one by one, as a mask of x's own shape does. parts: nodes that are put together from nothing."""
    a = bind(node)
    base, indices = a["self"], a["indices"]
    reads = packet(node) == "aten.index"
    if not isinstance(base, Node) or len(shape(base)) < 2 or (not reads and a["accumulate"]):
        return
    if len(shape(base)) - len(indices) not in (0, 1) or not all(isinstance(i, Node) for i in indices):
        return
    programs = [program_of(gm, i) for i in indices]
    positions = [None if read_by(one, inputs) else value_of(one, inputs) for one in programs]
    if len(indices) == len(shape(base)):
        positions = tokens_of_channels(positions, shape(base)[-1])
    spans = spans_of_positions(positions, shape(base))
    if not spans:
        return
    if reads:
        taken(gm, node, base, spans)
    elif numel(a["values"]) == written(spans, shape(base)):
        nothing = base in parts or packet(base) in FILLS
        new = joined(gm, node, base, a["values"], spans, in_prompt=not nothing)
        parts |= {new} if nothing else set()


def by_rank(gm: GraphModule, node: Node, inputs: Sequence[Any]) -> list[Fixed]:
    """`where(mask, features.gather(1, index), x)`, where the index counts the places of the mask, so that every feature is
    taken once and in order (pi0)."""
    mask_node, picked, base = node.args
    casts: list[Node] = []
    while isinstance(picked, Node) and packet(picked) in CASTS:
        casts.append(picked)
        picked = picked.args[0]
    whole = all(isinstance(n, Node) and shape(n) == shape(node) for n in (picked, base))
    if not whole or len(shape(node)) != 3 or packet(picked) != "aten.gather" or bind(picked)["dim"] % 3 != 1:
        return []
    features, programs = picked.args[0], [program_of(gm, n) for n in (mask_node, picked.args[2])]
    mask, index = (value_of(one, inputs) for one in programs)
    spans = None if mask is None else spans_of_mask(mask, shape(node))
    if index is None or mask is None or not spans:
        return []
    count = sum(stop - start for start, stop in spans)
    if shape(features) != (shape(node)[0], count, shape(node)[2]):
        return []
    taken_in_order = index.expand(shape(node))[:, mask.expand(shape(node))[0, :, 0]] == torch.arange(count)[:, None]
    if not bool(taken_in_order.all()):
        return []
    for cast in reversed(casts):
        features = emitter(gm, node)(cast.target, features, *cast.args[1:], **cast.kwargs)
    joined(gm, node, base, features, spans)
    held = [Fixed(programs[0], mask, placeholders_at(spans)), Fixed(programs[1], index, "features stand in their order")]
    return [one for one in held if read_by(one.program, inputs)]


def tokens_of_channels(positions: Sequence[Tensor | None], width: int) -> list[Tensor | None]:
    """Index tensors without the last one, where that counts the channels of each token that the others name."""
    if any(p is None or p.dim() != 1 or p.numel() % width for p in positions):
        return [None]
    *tokens, channels = (p.reshape(-1, width) for p in positions if p is not None)
    same = all(bool((t == t[:, :1]).all()) for t in tokens) and bool((channels == torch.arange(width)).all())
    return [t[:, 0] for t in tokens] if same else [None]


def joined(
    gm: GraphModule, node: Node, base: Node, features: Node, spans: Spans, in_prompt: bool = True
) -> Node:  # fmt: skip
    """`base` with `features` in the place of its tokens at `spans`. in_prompt: whether they may be an image's among text."""
    sizes = shape(base)
    axis, lead = len(sizes) - 2, list(sizes[:-2])
    emit = emitter(gm, node)
    count = sum(stop - start for start, stop in spans)
    rows = emit(aten.reshape.default, features, [*lead, count, sizes[-1]])
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
    if in_prompt and from_inputs(base):  # else they are laid out around weights, and in no prompt
        rows.meta[SAMPLES], new.meta[SPANS] = True, spans
    stand_in(node, new)
    return new


def taken(gm: GraphModule, node: Node, base: Node, spans: Spans) -> None:
    """The tokens of `base` at `spans`, as rows (rows of the batch * tokens, D)."""
    sizes, emit = shape(base), emitter(gm, node)
    pieces = [emit(aten.slice.Tensor, base, len(sizes) - 2, start, stop) for start, stop in spans]
    rows = pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, len(sizes) - 2)
    new = emit(aten.reshape.default, rows, list(shape(node)))
    stand_in(node, new)


def spans_of_mask(mask: Tensor, sizes: tuple[int, ...]) -> Spans | None:
    """The runs of True along the token axis, where all channels and all rows agree."""
    full = mask.expand(sizes)
    rows = full.any(-1)
    if not torch.equal(rows, full.all(-1)):
        return None
    rows = rows.reshape(-1, sizes[-2])
    return runs(rows[0]) if bool((rows == rows[0]).all()) else None


def apart(mask: Tensor, sizes: tuple[int, ...]) -> str:
    """Which row of a prompt holds its image elsewhere than the first one, in words; empty where none does."""
    rows = mask.expand(sizes).all(-1).reshape(-1, sizes[-2])
    other = next((i for i, row in enumerate(rows) if not torch.equal(row, rows[0])), 0)
    return f"sample {other} has its image at {runs(rows[other])}, and sample 0 at {runs(rows[0])}" if other else ""


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
