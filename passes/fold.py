"""Fold: what does not depend on the inputs is computed once and becomes a buffer."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from tokcompile.errors import InputError, UnsupportedGraph
from tokcompile.passes.graph import buffer, get_attr, packet
from tokcompile.passes.memory import CASTS, VIEWS, ancestors_of, influenced, mutates

LARGEST_FOLDED = 1 << 26  # elements; larger constants stay expressions
LARGEST_COMPARED = 1 << 16
FOLDED = "folded_weights"  # the key in the graph module's meta


class Folded:
    """The weights that constants were computed from. The model still holds them, and may train them or load others into them,
    which the constants do not follow: what is changed is refused later."""

    def __init__(self) -> None:
        self.weights: dict[str, Read] = {}

    def add(self, name: str, weight: torch.Tensor) -> None:
        self.weights.setdefault(name, Read(weight))

    def check(self, call: bool = False) -> None:
        """Raises: InputError where one was changed in place. call: whether it has to be quick."""
        changed = [name for name, read in self.weights.items() if read.changed(call)]
        if changed:
            more = f" and {len(changed) - 1} more" if changed[1:] else ""
            raise InputError(
                f"{changed[0]}{more} changed after the model was optimized, whose graph holds constants computed from it\n"
                "  what to do: train the original model, or load weights into it, and optimize it after that"
            )


class Read:
    """A weight as it was read. What is written through `weight.data` leaves no other trace than values, which are compared for
    small ones; in each call only on the CPU, since elsewhere that would wait for the device."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.version = None if weight.is_inference() else weight._version  # those have no versions
        small = weight.numel() <= LARGEST_COMPARED and weight.layout is torch.strided and not weight.is_quantized
        self.values = weight.detach().clone() if small else None

    def changed(self, call: bool) -> bool:
        if self.version is not None and self.weight._version != self.version:
            return True
        if self.values is None or (call and self.weight.device.type != "cpu"):
            return False
        with _disable_current_modes():  # while it is traced once more
            now, before = self.weight.detach(), self.values.to(self.weight.device)
            return now.dtype != before.dtype or not (torch.equal(now, before) or bool(before.isnan().any()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Read:
        """Versions of copies start anew; what was changed before stays so."""
        other = copy.copy(self)
        other.weight = copy.deepcopy(self.weight, memo)
        if self.version is not None:
            other.version = other.weight._version - (self.weight._version - self.version)
        return other


def fold_constants(gm: GraphModule) -> None:
    """Evaluates what does not depend on the inputs (rotary tables, relative biases, masks) into buffers.

    The constant part is run in graph order, so that in-place ops inside it need no rewriting; a value is taken at the
    moment it is first used by what depends on the inputs.
    """
    # what the inputs write into is folded as it is before the write; all that is computed from it stays in the graph
    dependent, written = influenced(gm)
    constant = [n for n in gm.graph.nodes if n not in dependent and n.op not in ("output", "placeholder")]
    frontier = {n for n in constant if foldable(n) and computed(n) and any(u in dependent or u.op == "output" for u in n.users)}
    frontier |= {n for n in written if n in set(constant) and n.op != "get_attr" and foldable(n)}
    needed = ancestors_of(frontier | {n for n in constant if mutates(n)}) if frontier else set()
    if any(not_real(get_attr(gm, n.target)) if n.op == "get_attr" else on_meta(n) for n in needed):
        return
    values: dict[Node, Any] = {}
    taken: dict[Node, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node in needed:
            values[node] = evaluate(gm, node, values)
            continue
        for n in node.all_input_nodes if node in dependent or node.op == "output" else ():
            if n in frontier and isinstance(values.get(n), torch.Tensor):
                taken.setdefault(n, values[n].detach().clone(memory_format=torch.contiguous_format))
    for node in ancestors_of(set(taken)):
        if node.op == "get_attr" and isinstance(weight := get_attr(gm, node.target), torch.Tensor):
            gm.meta.setdefault(FOLDED, Folded()).add(node.target, weight)
    for i, (node, value) in enumerate(taken.items()):
        if not torch.equal(value, values[node]) and not (value.is_floating_point() and value.isnan().any()):
            raise UnsupportedGraph("a constant is changed in place after it was used", node)
        name = next(name for j in count(i) if not hasattr(gm, name := f"_folded_{j}"))
        folded = buffer(gm, name, value, node)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    for node in reversed(constant):  # in-place ops count as impure, so dead code elimination leaves them
        if not node.users:
            gm.graph.erase_node(node)


def not_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or value.is_meta)


def on_meta(node: Node) -> bool:
    return isinstance(value := node.meta.get("val"), torch.Tensor) and value.device.type == "meta"


def foldable(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() <= LARGEST_FOLDED and "quantize" not in packet(node)


def computed(node: Node) -> bool:
    """Whether a constant is more than a view of a weight (views cost nothing and would copy the weight).

    Indices are small, and are read where they are constants of their own.
    """
    if node.op == "get_attr" or "quantize" in packet(node):
        return False
    if getattr(node.meta.get("val"), "dtype", None) == torch.int64:
        return True
    return packet(node) not in VIEWS | CASTS or any(computed(n) for n in node.all_input_nodes)


def evaluate(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        value = get_attr(gm, node.target)
        return value.clone() if any(mutates(u) and u.args[0] is node for u in node.users) else value
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    fn = get_attr(gm, node.target) if node.op == "call_module" else node.target
    try:
        with torch.no_grad():
            return fn(*args, **kwargs)
    except Exception as error:
        raise UnsupportedGraph(
            f"a constant of the graph cannot be computed: {error}",
            node,
            "torch.export wrote a graph that does not run by itself; export the parts that do",
        ) from error
