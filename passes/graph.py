"""Building an FX graph whose every node is run once on fake tensors, so that shapes are known and checked as it grows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

from tokcompile.errors import TokcompileError, UnsupportedGraph, first_line

aten = torch.ops.aten
RESHAPES = {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"}  # same values, same order


def copy_graph(gm: GraphModule) -> GraphModule:
    """A second graph over the same weights."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return draft(gm, graph)


def draft(root: torch.nn.Module, graph: Graph) -> GraphModule:
    """A graph module that is Python code only once it is called: passes make many graphs, and few of them run."""
    return _LazyGraphModule(root, graph)


def without_dead_code(root: torch.nn.Module, graph: Graph) -> GraphModule:
    """A draft without what nothing reads, neither nodes nor what they would be read from."""
    draft(root, graph).graph.eliminate_dead_code()
    return draft(root, graph)


def finished(gm: GraphModule) -> GraphModule:
    """A draft as a plain graph module, as other compilers expect it."""
    return GraphModule(gm, gm.graph) if isinstance(gm, _LazyGraphModule) else gm


def get_attr(module: torch.nn.Module, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def fake_attr(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode of the values that the nodes know."""
    mode = detect_fake_mode([n.meta.get("val") for n in graph.nodes])
    assert mode is not None, "propagate_shapes comes before"
    return mode


def propagate_shapes(gm: GraphModule, inputs: list[Any]) -> FakeTensorMode:
    """Gives every node a fake value in `meta['val']`; all of them share the mode that is returned."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True)
    interpreter = _Fake(gm, mode)
    with mode, torch.no_grad():
        interpreter.run(*(fake_attr(mode, v) for v in inputs))
    return mode


class _Fake(torch.fx.Interpreter):
    def __init__(self, gm: GraphModule, mode: FakeTensorMode):
        super().__init__(gm)
        self.mode = mode
        self.extra_traceback = False
        self.attrs: dict[int, Any] = {}  # a weight used twice is one fake tensor

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        if id(value) not in self.attrs:
            self.attrs[id(value)] = fake_attr(self.mode, value)
        return self.attrs[id(value)]

    def run_node(self, n: Node) -> Any:
        try:
            result = super().run_node(n)
        except TokcompileError:
            raise
        except Exception as error:
            raise UnsupportedGraph(
                f"the shape of this op's result is not known before it runs ({first_line(error)[:200]})",
                n,
                "make it static for these inputs, or optimize the part of the model after it",
            ) from error
        n.meta["val"] = result
        return result


def replace_results(node: Node, results: Any) -> None:
    """Puts results in the place of a call that gave them."""
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


class Builder:
    """Appends nodes to a new graph; `mode` is the fake mode of the values in the old one, `device` where they lie."""

    def __init__(self, root: torch.nn.Module, mode: FakeTensorMode, device: torch.device):
        self.root, self.mode, self.device = root, mode, device
        self.graph = Graph()
        self.origin: Node | None = None  # the old node that new ones are written for: they inherit its place in the model
        self._constants: dict[Any, Node] = {}

    def emit(self, target: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Node:
        """Adds one call and runs it on fake tensors."""
        fn = get_attr(self.root, target) if isinstance(target, str) else target
        fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            value = fn(*fake_args, **fake_kwargs)
        return self.known(value, target, *args, **kwargs)

    def known(self, value: Any, target: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Node:
        """Adds one call whose fake result is known."""
        op = "call_module" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["val"] = value
        if self.origin is not None:
            for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]
        return node

    def unpack(self, node: Node) -> list[Node]:
        """One getitem node per element of a tuple-valued node."""
        return [self.emit(operator.getitem, node, i) for i in range(len(node.meta["val"]))]

    def cat(self, pieces: Sequence[Node], dim: int) -> Node:
        """Pieces end to end; a single one as it is."""
        return self.emit(aten.cat.default, pieces, dim) if len(pieces) > 1 else pieces[0]

    def constant(self, value: torch.Tensor, name: str = "tokens") -> Node:
        """A buffer holding `value`, shared by equal values."""
        key = (name, value.dtype, tuple(value.shape), tuple(value.flatten().tolist()))
        if key not in self._constants:
            target = f"_tokcompile_{name}_{len(self._constants)}"
            # a model without its weights (meta) has its constants all the same; they only pass for meta tensors here
            meta = self.device.type == "meta"
            self.root.register_buffer(target, value if meta else value.to(self.device), persistent=True)
            self._constants[key] = node = self.attr(target)
            if meta:
                with self.mode:
                    node.meta["val"] = torch.empty_like(node.meta["val"], device="meta")
        return self._constants[key]

    def attr(self, target: str) -> Node:
        # constants stand at the top of the graph, so that any later node may use a shared one
        with self.graph.inserting_before(self._first()):
            node = self.graph.create_node("get_attr", target)
        node.meta["val"] = fake_attr(self.mode, get_attr(self.root, target))
        return node

    def _first(self) -> Node:
        return next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), self.graph._root)

    def copy(self, node: Node, env: Callable[[Node], Any]) -> Node:
        """Copies an old node unchanged; its value has the old shape."""
        new = self.graph.node_copy(node, env)
        new.meta = dict(node.meta)
        if isinstance(node.meta.get("val"), FakeTensor) and node.op == "placeholder":
            new.meta["val"] = node.meta["val"]
        return new


def emitter(gm: GraphModule, origin: Node) -> Callable[..., Node]:
    """Adds calls before `origin` that inherit its place in the model."""

    def emit(target: Any, *args: Any, **kwargs: Any) -> Node:
        with gm.graph.inserting_before(origin):
            new = gm.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in origin.meta.items() if k != "val"}
        return new

    return emit


def buffer(gm: GraphModule, name: str, value: torch.Tensor, user: Node, persistent: bool = True) -> Node:
    """A constant under a name of its own, read before `user`."""
    gm.register_buffer(name, value, persistent=persistent)
    with gm.graph.inserting_before(user):
        return gm.graph.get_attr(name)


def stand_in(node: Node, new: Node) -> None:
    """`new`, which holds the same, is read in the place of a node, which goes."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def filled(gm: GraphModule, node: Node, number: float) -> None:
    """A node becomes a tensor of one number, which depends on nothing."""
    value = node.meta["val"]
    stand_in(node, emitter(gm, node)(aten.full.default, list(value.shape), number, dtype=value.dtype, device=value.device))


def device_of(graph: Graph) -> torch.device:
    """Where the first tensor among the inputs lies."""
    values = (n.meta.get("val") for n in graph.find_nodes(op="placeholder"))
    return next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))


def shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def numel(node: Node) -> int:
    return prod(shape(node))


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def packet(node: Node) -> str:
    """`aten.add` for any overload of it; the name of the function for what is not an ATen op."""
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "_schema", None)
    if name is not None:
        return name.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def bind(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    out = {}
    for i, arg in enumerate(schema.arguments):
        if i < len(node.args) and not arg.kwarg_only:
            out[arg.name] = node.args[i]
        elif arg.name in node.kwargs:
            out[arg.name] = node.kwargs[arg.name]
        else:
            out[arg.name] = arg.default_value
    return out


def user_dependent(graph: Graph) -> set[Node]:
    """The nodes whose value depends on what the user passes in."""
    out: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in out for n in node.all_input_nodes):
            out.add(node)
    return out


def to_int(value: Any) -> int | None:
    with suppress(TypeError, ValueError):
        return int(value)
    return None
