"""Stages: runs of blocks over the same tokens, and where these were laid out, read off the graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from tokcompile.passes.graph import RESHAPES, bind, packet, shape, to_int
from tokcompile.passes.memory import CASTS, is_view
from tokcompile.passes.placeholders import SPANS, WRITES

LAYOUT = {"aten.permute", "aten.transpose", "aten.contiguous", "aten.clone", "aten.t", "aten.movedim", "aten.swapaxes",
          "aten.swapdims", "aten.mT", "aten.numpy_T", "aten.adjoint"}  # fmt: skip
INDEX = {"aten.index", "aten.index_select", "aten.gather"}
PATCHES = {"aten.conv2d", "aten.conv3d", "aten.convolution", "aten.im2col", "aten.conv1d"}


@dataclass
class Stage:
    """A run of blocks over the same tokens: `length` in all, of which `n` between prefix and suffix are visual.

    text: whether it is the stream of a language model; spans: where image features were written into it, if anywhere.
    """

    length: int
    prefix: int
    suffix: int
    grid: tuple[int, ...] | None
    visual: bool
    text: bool = False
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def n(self) -> int:
        return self.length - self.prefix - self.suffix


def make_stage(
    entry: Node, axis: int, length: int, dependent: set[Node], upstream: set[Node], queries: bool, features: bool = False
) -> Stage:
    """The stage whose tokens come in at `entry`. dependent: what depends on the inputs; upstream: what of it comes before;
    queries: whether the tokens are weights that look at image features, as in a decoder, and no patches; features: whether
    they become image features in a prompt."""
    spans = placeholder_spans(upstream, length)
    if spans:
        return Stage(length, spans[0][0], length - spans[-1][1], None, visual=False, text=True, spans=spans)
    prefix, suffix, grid, source = origin(entry, axis, dependent)
    body = length - prefix - suffix
    if grid is not None and body != prod(grid):
        grid = None
    above = {packet(n) for n in upstream}
    # in a language model that image features were written into, nothing says which positions are visual
    text = packet(source) == "aten.embedding" or bool(above & WRITES)
    visual = not text and not queries and (features or bool(above & PATCHES))
    return Stage(length, prefix, suffix, grid, visual, text)


def placeholder_spans(upstream: set[Node], length: int) -> tuple[tuple[int, int], ...]:
    """The places of image features in a prompt of that length, from all writes that lie before."""
    written = [n for n in upstream if SPANS in n.meta and shape(n)[-2] == length]
    return tuple(sorted({span for n in written for span in n.meta[SPANS]}))


def origin(node: Node, axis: int, dependent: set[Node]) -> tuple[int, int, tuple[int, ...] | None, Node]:
    """Walks back from a block's input to where its tokens were laid out: (prefix, suffix, grid, the op that did it). Images
    side by side have no grid in common."""
    prefix = suffix = 0
    least = (0, 0)  # what was joined before and behind stays there, whatever was cut off the middle before that
    turned = False  # whether what is read now stands in the opposite order
    while node in dependent and node.op == "call_function":
        name, a = packet(node), bind(node)
        rank = len(shape(node)) if isinstance(node.meta["val"], torch.Tensor) else 0
        if name == "aten.cat" and (to_int(a["dim"]) or 0) % rank == axis:
            tensors = a["tensors"]
            user = [t for t in tensors if t in dependent] or list(tensors)
            node = max(user, key=lambda t: shape(t)[axis])
            images = beside(tensors.index(node), [shape(t)[axis] > 1 and from_patches(t) for t in tensors])
            before, behind = (sum(shape(t)[axis] for t in some) for some in (tensors[: images[0]], tensors[images[-1] + 1 :]))
            prefix, suffix = (prefix + behind, suffix + before) if turned else (prefix + before, suffix + behind)
            least = max(least[0], prefix), max(least[1], suffix)
            if len(images) > 1:
                break
        elif name == "aten.slice" and (a["dim"] or 0) % rank == axis:
            size = shape(a["self"])[axis]
            start, end = slice_bounds(a["start"], a["end"], size)
            before, behind = (size - end, start) if turned else (start, size - end)
            prefix, suffix, node = prefix - before, suffix - behind, a["self"]
        elif name == "aten.flip":
            turned, node = turned != (axis in [d % rank for d in a["dims"]]), a["self"]
        elif name == "aten.unsqueeze" and a["dim"] % rank != axis:
            axis, node = axis - (a["dim"] % rank < axis), node.args[0]
        elif name == "aten.select" or (name == "aten.squeeze" and isinstance(a.get("dim"), int)):
            dim = a["dim"] % len(shape(a["self"]))
            axis, node = axis + (dim <= axis and len(shape(a["self"])) > rank), a["self"]
        elif name in LAYOUT:
            axis, node = moved(node, axis), node.all_input_nodes[0]
        elif name in RESHAPES:
            source = node.all_input_nodes[0]
            axes = view_sources(shape(source), shape(node), axis)
            if axes is None:
                apart = in_rows(source, node, dependent)
                if apart is None:
                    break
                node = apart
                continue
            if len(axes) > 1:
                # what an index laid out is no raster: groups of neighbours in the order of windows
                grid = None if packet(source) in INDEX else tuple(shape(source)[i] for i in axes)
                return max(prefix, least[0]), max(suffix, least[1]), grid, source
            axis, node = axes[0], source
        else:
            length = shape(node)[axis] if rank else None
            follow = [
                n
                for n in node.all_input_nodes
                if n in dependent
                and isinstance(n.meta["val"], torch.Tensor)
                and len(shape(n)) == rank
                and shape(n)[axis] == length
            ]
            if not follow:
                break
            node = follow[0]
    return max(prefix, least[0]), max(suffix, least[1]), None, node


def in_rows(rows: Node, view: Node, dependent: set[Node]) -> Node | None:
    """The tensor (B, N, C) whose tokens were handled as (B * N, C) rows, which a view then laid out as before."""
    lead = shape(view)[:-1]
    while rows in dependent and shape(rows)[:-1] == (prod(lead),):
        found = next((n for n in rows.all_input_nodes if n in dependent and shape(n)[:-1] == lead), None)
        if packet(rows) in RESHAPES and found is not None:
            return found
        given = [n for n in rows.all_input_nodes if n in dependent and shape(n)[:-1] == shape(rows)[:-1]]
        if not given:
            return None
        rows = given[0]
    return None


def beside(at: int, images: list[bool]) -> list[int]:
    """The pieces around piece `at` that are images too."""
    first = last = at
    while first and images[first - 1]:
        first -= 1
    while last + 1 < len(images) and images[last + 1]:
        last += 1
    return list(range(first, last + 1))


def from_patches(node: Node) -> bool:
    """Whether a tensor is the patches of an image themselves, only laid out anew: what is computed from an image, such as a
    class token, is none."""
    while is_view(node) or packet(node) in LAYOUT | CASTS:
        node = node.args[0]
    return packet(node) in PATCHES


def slice_bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    start, stop, _ = slice(start, end).indices(size)
    return start, stop


def moved(node: Node, axis: int) -> int:
    """The axis of the input that axis `axis` of a permuted tensor came from: the op is run on strides that tell them apart."""
    source = node.all_input_nodes[0]
    rank = len(shape(source))
    if packet(node) in ("aten.contiguous", "aten.clone"):
        return axis
    marks = torch.empty_strided([2] * rank, list(range(1, rank + 1)), device="meta")
    args = [marks if a is source else a for a in node.args]
    return int(node.target(*args, **node.kwargs).stride()[axis]) - 1


def view_sources(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> list[int] | None:
    """The axes that a view joined into axis `axis`, or None where it cut one apart."""
    lead = prod(after[:axis])
    total, out, product = 1, [], 1
    for i, size in enumerate(before):
        if total == lead and product < after[axis] and size > 1:
            out.append(i)
            product *= size
        elif total < lead:
            total *= size
    return out if total == lead and product == after[axis] and out else None
