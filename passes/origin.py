"""Origin: where the tokens of a block were laid out, and what was joined to them since; read off the graph, backwards."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from tokcompile.passes.graph import RESHAPES, bind, is_tensor, packet, shape, to_int
from tokcompile.passes.memory import CASTS, is_view

LAYOUT = {"aten.permute", "aten.transpose", "aten.contiguous", "aten.clone", "aten.t", "aten.movedim", "aten.swapaxes",
          "aten.swapdims", "aten.mT", "aten.numpy_T", "aten.adjoint"}  # fmt: skip
INDEX = {"aten.index", "aten.index_select", "aten.gather"}
OWN = {"aten.add", "aten.mul", "aten.layer_norm", "aten.rms_norm"}  # what leaves each token itself
PATCHES = {"aten.conv2d", "aten.conv3d", "aten.convolution", "aten.im2col", "aten.conv1d"}


@dataclass
class Origin:
    """Where a walk back has come to: the tensor and the axis that the tokens are on there, how many others stand before
    (prefix) and behind them (suffix) at its start, and the grid that they were, once it is known.

    least: what was joined before and behind stays there, whatever was cut off the middle before that. turned: whether what is
    read now stands in the opposite order.
    """

    node: Node
    axis: int
    prefix: int = 0
    suffix: int = 0
    least: tuple[int, int] = (0, 0)
    turned: bool = False
    grid: tuple[int, ...] | None = None

    def grow(self, before: int, behind: int) -> None:
        """As many were joined on the way; cut off, where they are less than none."""
        before, behind = (behind, before) if self.turned else (before, behind)
        self.prefix, self.suffix = self.prefix + before, self.suffix + behind

    def step(self, dependent: set[Node]) -> bool:
        """Goes one op back; whether there may be more."""
        node, name, a = self.node, packet(self.node), bind(self.node)
        rank = len(shape(node)) if is_tensor(node) else 0
        if name == "aten.cat" and (to_int(a["dim"]) or 0) % rank == self.axis:
            return self.before_cat(a["tensors"], dependent)
        if name in RESHAPES:
            return self.before_view(node.all_input_nodes[0], dependent)
        if name in LAYOUT:
            self.node, self.axis = node.all_input_nodes[0], moved(node, self.axis)
        elif name == "aten.slice" and (a["dim"] or 0) % rank == self.axis:
            size = shape(a["self"])[self.axis]
            start, end = slice_bounds(a["start"], a["end"], size)
            self.node = a["self"]
            self.grow(-start, end - size)
        elif name == "aten.gather" and a["dim"] % rank == self.axis:  # in an order of each sample's own, as after masking
            return False
        elif name == "aten.flip":
            self.node, self.turned = a["self"], self.turned != (self.axis in [d % rank for d in a["dims"]])
        elif name == "aten.unsqueeze" and a["dim"] % rank != self.axis:
            self.node, self.axis = a["self"], self.axis - (a["dim"] % rank < self.axis)
        elif name == "aten.stack" and len(a["tensors"]) == 1 and a["dim"] % rank != self.axis:
            self.node, self.axis = a["tensors"][0], self.axis - (a["dim"] % rank < self.axis)
        elif name == "aten.select" or (name == "aten.squeeze" and isinstance(a.get("dim"), int)):
            before = len(shape(a["self"]))
            self.node, self.axis = a["self"], self.axis + (a["dim"] % before <= self.axis and before > rank)
        else:
            return self.before_others(rank, dependent)
        return True

    def before_cat(self, tensors: list[Node], dependent: set[Node]) -> bool:
        user = [t for t in tensors if t in dependent] or list(tensors)
        self.node = max(user, key=lambda t: shape(t)[self.axis])
        images = beside(tensors.index(self.node), [shape(t)[self.axis] > 1 and from_patches(t, dependent) for t in tensors])
        self.grow(*(sum(shape(t)[self.axis] for t in some) for some in (tensors[: images[0]], tensors[images[-1] + 1 :])))
        self.least = max(self.least[0], self.prefix), max(self.least[1], self.suffix)
        return len(images) == 1  # images side by side have no grid in common

    def before_view(self, source: Node, dependent: set[Node]) -> bool:
        axes = view_sources(shape(source), shape(self.node), self.axis)
        if axes is None:
            apart = in_rows(source, self.node, dependent)
            self.node = apart or self.node
            return apart is not None
        self.node, self.axis = source, axes[0]
        if len(axes) > 1 and packet(source) not in INDEX:  # what an index laid out is no raster: neighbours, window by window
            self.grid = tuple(shape(source)[i] for i in axes)
        return len(axes) == 1

    def before_others(self, rank: int, dependent: set[Node]) -> bool:
        """Ops that leave the tokens where they are."""
        length = shape(self.node)[self.axis] if rank else None
        for n in self.node.all_input_nodes:
            if n in dependent and is_tensor(n) and len(shape(n)) == rank and shape(n)[self.axis] == length:
                self.node = n
                return True
        return False


def origin(node: Node, axis: int, dependent: set[Node]) -> Origin:
    """Where the tokens on an axis of a block's input were laid out."""
    found = Origin(node, axis)
    while found.node in dependent and found.node.op == "call_function" and found.step(dependent):
        pass
    found.prefix, found.suffix = max(found.prefix, found.least[0]), max(found.suffix, found.least[1])
    return found


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


def from_patches(node: Node, dependent: set[Node]) -> bool:
    """Whether a tensor is the patches of an image themselves, only laid out anew, with positions or a norm: what is computed
    from an image, such as a class token, is none."""
    while True:
        given = [n for n in node.all_input_nodes if n in dependent]
        table = len(node.all_input_nodes) > 1 and len(given) == 1
        own = packet(node) in OWN and table and shape(given[0]) == shape(node)
        if not own and not is_view(node) and packet(node) not in LAYOUT | CASTS:
            return packet(node) in PATCHES
        node = given[0] if own else node.args[0]


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
