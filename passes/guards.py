"""Guards: what tracing fixed from the example inputs is checked on every later call.

Replay marks each fixed value with an assertion in the exported program, so that a saved program keeps them. From there they
become a small graph of their own, from the inputs to one boolean a guard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.errors import InputError
from tokcompile.passes.canonicalise import drop_asserts, inline_regions
from tokcompile.passes.fold import evaluate, foldable
from tokcompile.passes.graph import copy_graph, packet
from tokcompile.passes.memory import ancestors_of, base_of, influenced, mutates
from tokcompile.passes.vmap import flatten_vmap

CONDITION = re.compile(r" gave (True|False)\b")
MARK = "fixed from the example inputs: "


def mark(holds: torch.Tensor, text: str) -> None:
    """While tracing: `holds` was true for the example inputs and has to be true for others."""
    torch._assert_async(holds.all(), MARK + text)


def same(tensor: torch.Tensor, value: Any) -> torch.Tensor:
    """Whether a tensor has a value (a number, nested lists or a tensor); floats may have been rounded otherwise."""
    if tensor.is_floating_point():
        other = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        return torch.isclose(tensor, other, equal_nan=True)
    if isinstance(value, list):
        value = torch.tensor(value, dtype=tensor.dtype, device=tensor.device)
    return tensor == value


def true_at(mask: torch.Tensor, at: list[torch.Tensor]) -> torch.Tensor:
    """Whether a mask is True exactly at these positions, one tensor an axis."""
    expected = torch.zeros(mask.shape, dtype=mask.dtype, device=mask.device)
    expected[tuple(at)] = 1
    return mask == expected


def scalar_holds(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Whether a method that gives one Python value gives this one; None where only shapes decide."""
    tensor = args[0]
    if name in ("__bool__", "is_nonzero"):
        return (tensor if tensor.dtype is torch.bool else tensor != 0) == value
    if name == "__contains__":
        return (tensor == args[1]).any() == value
    if name == "allclose":
        return torch.isclose(*args, **kwargs).all() == value
    if name == "equal":
        return (tensor == args[1]).all() == value if tensor.shape == args[1].shape else None
    return same(tensor.long() if name == "__int__" else tensor, value)


class Guards:
    """Conditions on the inputs. gm: flat inputs in, one boolean tensor a condition out. texts: what each has fixed."""

    def __init__(self, gm: GraphModule, texts: Sequence[str]):
        self.gm, self.texts = gm, list(texts)

    @property
    def lines(self) -> list[str]:
        """What was fixed, each once."""
        return list(dict.fromkeys(self.texts))

    def behind(self, names: set[str]) -> list[str]:
        """What was fixed of values, other than conditions, that are computed from one of these nodes."""
        (found,) = (n.args[0] for n in self.gm.graph.nodes if n.op == "output")
        reads = [(node, text) for node, text in zip(found, self.texts) if not CONDITION.search(text)]
        return list(dict.fromkeys(text for node, text in reads if names & {n.name for n in ancestors_of({node})}))

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError where a condition does not hold."""
        with torch.no_grad():
            holds = self.gm(*inputs)
            if bool(torch.stack([one.to(holds[0].device) for one in holds]).all()):
                return
        broken = dict.fromkeys(text for one, text in zip(holds, self.texts) if not bool(one))
        raise InputError(
            "these inputs differ from the example inputs in what was fixed while tracing: on the example inputs "
            f"{'; '.join(list(broken)[:3])}\n  what to do: optimize once more with these inputs as the example"
        )


def collect(gm: GraphModule) -> Guards | None:
    """The marked conditions of an exported graph that depend on its inputs; `gm` is kept."""
    gm = copy_graph(gm)
    inline_regions(gm)
    flatten_vmap(gm)
    return conditions(gm, [(n.args[0], n.args[1][len(MARK) :]) for n in marked(gm)])


def conditions(gm: GraphModule, wanted: Sequence[tuple[Node, str]]) -> Guards | None:
    """`gm` cut down, in place, to the conditions that depend on its inputs."""
    dependent, _ = influenced(gm)
    wanted = [(node, text) for node, text in wanted if node in dependent]
    if not wanted:
        return None
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ([node for node, _ in wanted],)
    drop_asserts(gm)
    needed = ancestors_of({output})
    while writes := {n for n in gm.graph.nodes if mutates(n) and n not in needed and base_of(n.args[0]) in needed}:
        needed |= ancestors_of(writes)
    for node in reversed(gm.graph.nodes):
        if node not in needed and node.op != "placeholder":
            gm.graph.erase_node(node)
    gm.recompile()
    return Guards(torch.fx.GraphModule(gm, gm.graph), [f"{text} from {inputs_of(node)}" for node, text in wanted])


def inputs_of(node: Node) -> str:
    """The names of the inputs that a node is computed from."""
    needed = ancestors_of({node})
    return ", ".join(n.name for n in node.graph.nodes if n.op == "placeholder" and n in needed)


def marked(gm: GraphModule) -> list[Node]:
    return [
        n for n in gm.graph.nodes if packet(n) == "aten._assert_async" and len(n.args) > 1 and str(n.args[1]).startswith(MARK)
    ]


def settle(gm: GraphModule) -> None:
    """Takes the marks out of a graph, in place; tensors that a mark holds equal to a constant become that constant."""
    dependent, _ = influenced(gm)
    for node in marked(gm):
        condition = node.args[0]
        gm.graph.erase_node(node)
        if condition in dependent:
            fix(gm, condition, dependent)
        erase_unused(gm, condition)
    for module in gm.modules():
        if isinstance(module, GraphModule) and module is not gm:
            for node in marked(module):
                module.graph.erase_node(node)
                erase_unused(module, node.args[0])
            module.recompile()
    gm.recompile()


def fix(gm: GraphModule, condition: Node, dependent: set[Node]) -> None:
    """Replaces `t` by a constant where the condition is `(t == constant).all()` over numbers that compare exactly."""
    equal = condition.args[0]
    if packet(condition) != "aten.all" or not isinstance(equal, Node) or packet(equal) != "aten.eq":
        return
    tensor, constant = equal.args
    value = tensor.meta.get("val") if isinstance(tensor, Node) else None
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or not foldable(tensor) or value.is_meta:
        return
    if constant in dependent or changed_in_place(gm, tensor):
        return
    fixed = constant_value(gm, constant).to(value.dtype).expand(value.shape).contiguous()
    name = f"_fixed_{len(list(gm.buffers()))}"
    gm.register_buffer(name, fixed.to(value.device))
    with gm.graph.inserting_after(tensor):
        new = gm.graph.get_attr(name)
    new.meta = dict(tensor.meta)
    tensor.replace_all_uses_with(new, delete_user_cb=lambda user: user is not equal)


def changed_in_place(gm: GraphModule, tensor: Node) -> bool:
    base = base_of(tensor)
    return any(mutates(n) and isinstance(n.args[0], Node) and base_of(n.args[0]) is base for n in gm.graph.nodes)


def constant_value(gm: GraphModule, constant: Any) -> torch.Tensor:
    if not isinstance(constant, Node):
        return torch.tensor(constant)
    values: dict[Node, Any] = {}
    needed = ancestors_of({constant})
    for node in gm.graph.nodes:
        if node in needed:
            values[node] = evaluate(gm, node, values)
    return values[constant]


def erase_unused(gm: GraphModule, node: Any) -> None:
    if isinstance(node, Node) and not node.users and node.op != "placeholder" and not mutates(node):
        inputs = node.all_input_nodes
        gm.graph.erase_node(node)
        for one in inputs:
            erase_unused(gm, one)
