"""Calls: how the modules that mix tokens along their sequence were called while a model was traced, and those calls again.

Marks in the graph say where each call begins and ends, and on which tensors; the modules themselves stay at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tokcompile.errors import TokcompileError
from tokcompile.passes.graph import copy_graph, packet

MARK = "tokcompile.called"
CALLS = "mixer_calls"  # the key in the meta of the program that was traced from a model
Size = tuple[int, ...]

_OPS = torch.library.Library("tokcompile", "FRAGMENT")
_OPS.define("called(Tensor[] values, int call, bool done) -> ()")
_OPS.impl("called", lambda values, call, done: None, "CompositeExplicitAutograd")
torch.fx.node.has_side_effect(torch.ops.tokcompile.called.default)  # so that no pass takes it for dead code


def is_mixer(module: nn.Module) -> bool:
    """Whether a module convolves along its sequence, channel by channel, so that each token sees those before it."""
    return any(
        isinstance(c, nn.Conv1d)
        and c.groups == c.in_channels == c.out_channels
        and c.kernel_size[0] > 1
        and c.stride == (1,)
        and not isinstance(c.padding, str)
        and c.padding[0] >= c.dilation[0] * (c.kernel_size[0] - 1)
        for c in module.children()
    )


@dataclass(frozen=True)
class Hole:
    """Where a tensor stands among the arguments of a call."""

    shape: Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class MixerCall:
    """One call. arguments: with holes for tensors. holes: these, by the way that leads to them. left: the ways to all tensors
    that were there afterwards, in the result or in an argument such as a cache. made, refused: of modules like this one too."""

    path: str
    module: nn.Module
    arguments: Any
    holes: dict[str, Hole]
    left: list[str] = field(default_factory=list)
    made: list[Shorter] = field(default_factory=list)
    refused: list[dict[str, Size]] = field(default_factory=list)

    @property
    def fresh(self) -> list[int]:
        """Which of the tensors in `left` the call made."""
        return [i for i, way in enumerate(self.left) if way not in self.holes]

    def over(self, sizes: dict[str, Size]) -> Shorter | None:
        """The call traced again on tensors of other sizes; None where the module does not take them, or reads values."""
        found = next((s for s in self.made if all(sizes.get(way) == size for way, size in s.sizes.items())), None)
        if found is None and sizes not in self.refused:
            found = traced_again(self, sizes)
            if found is None:
                self.refused.append(sizes)
            else:
                self.made.append(found)
        return found

    def like(self, other: MixerCall) -> bool:
        """Whether the two would be traced to the same graph over other weights."""
        (args, kwargs), (others, named) = self.arguments, other.arguments
        if len(args) != len(others) or list(kwargs) != list(named):
            return False
        pairs = [*zip(args, others), *((value, named[name]) for name, value in kwargs.items())]
        same = all(equal(a, b) or (type(a) is type(b) and not plain_value(a)) for a, b in pairs)
        return same and alike(self.module, other.module)


@dataclass
class Shorter:
    """A mixer's graph over a shorter sequence. Its inputs are tensors, by the way they are held at, and weights, by their
    names; sizes: of the tensors that are read. Outputs: the tensors that the call makes."""

    gm: GraphModule
    tensors: list[str]
    weights: list[str]
    sizes: dict[str, Size]


class Again(nn.Module):
    """A call as a function of the tensors among its arguments and of the module's weights, which are not its own here."""

    def __init__(self, call: MixerCall):
        super().__init__()
        self.mixer_call = call

    def forward(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        call = self.mixer_call
        args, kwargs = copied(call.arguments, {id(call.holes[way]): tensor for way, tensor in tensors.items()})
        out = torch.func.functional_call(call.module, dict(weights), args, kwargs)
        found = tensors_in({"out": out, "args": args, "kwargs": kwargs})
        if list(found) != call.left:
            raise RuntimeError("at another length it gives other tensors")
        return [list(found.values())[i] for i in call.fresh]


def traced_again(call: MixerCall, sizes: Mapping[str, Size]) -> Shorter | None:
    from tokcompile.passes.canonicalise import canonicalise
    from tokcompile.passes.trace import trace

    tensors = {way: torch.zeros(sizes[way], dtype=hole.dtype, device=hole.device) for way, hole in call.holes.items()}
    weights = dict([*call.module.named_parameters(), *call.module.named_buffers()])
    try:
        traced = trace(Again(call).eval(), (tensors, weights))
        if traced.checks:
            return None
        gm = canonicalise(traced.gm, traced.inputs)
    except TokcompileError:
        return None
    read = [bool(n.users) for n in gm.graph.find_nodes(op="placeholder")]
    return Shorter(gm, list(tensors), list(weights), {way: sizes[way] for way, used in zip(tensors, read) if used})


# -- while tracing -----------------------------------------------------------------------------------------------------


@contextmanager
def watched(model: nn.Module) -> Iterator[list[MixerCall]]:
    """Marks in the graph that is traced meanwhile each call of a mixer, and gives the list of these calls."""
    calls: list[MixerCall] = []
    running: list[int] = []
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if is_mixer(module):
                stack.enter_context(module.register_forward_pre_hook(begin(path, calls, running), with_kwargs=True))
                stack.enter_context(module.register_forward_hook(end(calls, running), with_kwargs=True))
        yield calls


def begin(path: str, calls: list[MixerCall], running: list[int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensors_in({"args": args, "kwargs": kwargs})
        holes = {way: Hole(tuple(t.shape), t.dtype, t.device) for way, t in given.items()}
        arguments = copied((args, kwargs), {id(t): holes[way] for way, t in given.items()})
        call = MixerCall(path, module, arguments, holes)
        same = next((one for one in calls if one.like(call)), None)
        if same is not None:
            call.made, call.refused = same.made, same.refused
        calls.append(call)
        running.append(len(calls) - 1)
        torch.ops.tokcompile.called(list(given.values()), running[-1], False)

    return hook


def end(calls: list[MixerCall], running: list[int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        number = running.pop()
        found = tensors_in({"out": out, "args": args, "kwargs": kwargs})
        calls[number].left = list(found)
        torch.ops.tokcompile.called(list(found.values()), number, True)

    return hook


def marks(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if packet(n) == MARK]


def erase_marks(graph: Graph) -> None:
    """Also in a program that is to be saved, which does not hold the model itself."""
    for node in marks(graph):
        graph.erase_node(node)


def unmarked(gm: GraphModule) -> GraphModule:
    """The graph to be run or written, without marks; `gm` is kept."""
    if marks(gm.graph):
        gm = copy_graph(gm)
        erase_marks(gm.graph)
        gm.recompile()
    return gm


# -- what arguments hold -----------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Every tensor that a value holds, in lists, dictionaries and objects such as caches, by the way that leads there."""
    return {way: one for way, one in leaves(value).items() if isinstance(one, Tensor)}


def leaves(value: Any) -> dict[str, Any]:
    """The tensors and modules in a value, by the way that leads there."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(value: Any, way: str) -> None:
        if isinstance(value, (Tensor, nn.Module)):
            found[way] = value
        elif isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                look(one, f"{way}.{i}")
        elif isinstance(value, dict):
            for name, one in value.items():
                look(one, f"{way}.{name}")
        elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value) and id(value) not in seen:
            seen.add(id(value))
            look(vars(value), way)

    look(value, "")
    return found


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy in which some things are replaced, by their ids, and modules stay what they are."""
    return copy.deepcopy(value, memo | {id(one): one for one in leaves(value).values() if isinstance(one, nn.Module)})


# -- modules of one kind -----------------------------------------------------------------------------------------------

OWN = {*vars(nn.Module()), "layer_idx"}  # what every module has; and a layer's number, by which it only finds its cache


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules compute the same but for their weights."""
    if type(a) is not type(b) or list(a._modules) != list(b._modules):
        return False
    for x, y in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        kinds = [{name: t if t is None else (t.shape, t.dtype) for name, t in one.items()} for one in (x, y)]
        if kinds[0] != kinds[1]:
            return False
    (mine, theirs) = ({name: v for name, v in vars(m).items() if name not in OWN} for m in (a, b))
    if list(mine) != list(theirs) or not all(equal(value, theirs[name]) for name, value in mine.items()):
        return False
    pairs = zip(a._modules.values(), b._modules.values())
    return all(x is y or (x is not None and y is not None and alike(x, y)) for x, y in pairs)


def equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and plain_value(a) and bool(a == b))


def plain_value(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(plain_value, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, Hole))
