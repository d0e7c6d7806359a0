"""`torch.compile(model, backend="tokcompile", options={...})`: the same passes on Dynamo's graph, then another backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from tokcompile.compiler import compile_plan, settings_for, understand
from tokcompile.errors import InputError, PlanError, TraceError, UnsupportedGraph
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.graph import finished
from tokcompile.passes.plan import SAY_IT_THERE, Plan
from tokcompile.passes.trace import Traced

OWN = ("method", "budget", "where", "spans", "recover", "plan", "size_weighted_mean", "inner", "inner_options")


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """A Dynamo backend; use it with fullgraph=True, dynamic=False.

    options: method, budget, where, spans, recover, plan and the method's own options as in `tokcompile.optimize`; inner:
    the backend that compiles the rewritten graph ("inductor" by default, or "eager"), with inner_options for it.

    Raises: as `tokcompile.optimize`; UnsupportedGraph where Dynamo broke the model into pieces without blocks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's fused kernels hide the attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 4).eval()
        >>> fast = torch.compile(model, backend="tokcompile", fullgraph=True, dynamic=False,
        ...                      options={"method": "random", "budget": 0.5, "inner": "eager"})
        >>> with torch.no_grad():
        ...     fast(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """
    # Dynamo's own tracing context would lend its fake tensors to ours, with symbolic sizes
    with torch._guards.tracing(None):
        return lower(gm, example_inputs, dict(options or {}))


def lower(gm: GraphModule, example_inputs: Sequence[Any], given: dict[str, Any]) -> Callable[..., Any]:
    """The passes of `optimize` on one Dynamo graph; `given` are the backend's options."""
    own = {name: given.pop(name) for name in OWN if name in given}
    plan = own.get("plan")
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if plan is not None and (both := [name for name in ("method", "budget", "where", "recover") if name in own]):
        raise PlanError(f"options has both a plan and {', '.join(both)}, which a plan says itself: {SAY_IT_THERE}")
    outputs = given.pop("outputs", plan.outputs if plan else "keep")
    if outputs != "keep":
        raise InputError(
            f"outputs={outputs!r}: torch.compile returns what the model returns; use tokcompile.optimize for others"
        )
    settings = settings_for(
        plan.method if plan else own.get("method", "tome"),
        {**(plan.options if plan else {}), **given},
        recover=plan.recover if plan else own.get("recover", "end"),
        spans=own.get("spans"),
        size_weighted_mean=own.get("size_weighted_mean", True),
    )
    compile_inner = inner_backend(own.get("inner", "inductor"), own.get("inner_options"))
    traced, user = to_aten(gm, example_inputs)
    analysis = understand(traced, canonicalise(traced.gm, traced.inputs), {})
    if not analysis.structure.blocks:
        raise UnsupportedGraph(
            "this piece of the model holds no attention block",
            hint="Dynamo may have broken the model at Python that it cannot trace (fullgraph=True shows where), or "
            "have captured the fused kernels of nn.TransformerEncoder (torch.backends.mha.set_fastpath_enabled(False) first); "
            "or use tokcompile.optimize",
        )
    compiled = compile_plan(analysis, settings, own.get("budget", 0.5), own.get("where"), plan)
    result = finished(compiled.rewritten.gm if compiled.rewritten else traced.gm)
    run = compile_inner(result, traced.inputs)

    def call(*inputs: Any) -> Any:
        if compiled.rewritten:
            analysis.folded.check(call=True)
        return run(*(inputs[i] for i in user))

    return call


def to_aten(gm: GraphModule, inputs: Sequence[Any]) -> tuple[Traced, list[int]]:
    """Dynamo's torch-level graph as an ATen graph over the user's inputs, weights as attributes; and which inputs those are."""
    if any(isinstance(v, (torch.SymInt, int)) or has_symbols(v) for v in inputs):
        raise InputError("the shapes are dynamic: compile with dynamic=False, since budgets are fixed at compile time")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    user = [i for i, n in enumerate(placeholders) if not is_weight(n, inputs[i])]
    bound = bind_weights(gm, placeholders, inputs, user)
    values = [inputs[i] for i in user]
    try:
        with torch.no_grad(), preserve_node_meta():
            aten = make_fx(lambda *v: list(pytree.tree_leaves(Interpreter(bound).run(*v))), pre_dispatch=True)(*values)
    except Exception as error:
        raise TraceError(f"Dynamo's graph cannot be lowered to ATen: {type(error).__name__}: {error}") from error
    spec = pytree.tree_flatten((tuple(values), {}))[1]
    return Traced(aten, values, spec, pytree.tree_flatten(list(range(8)))[1]), user


def has_symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(not isinstance(s, int) for s in value.shape)


def is_weight(node: Node, value: Any) -> bool:
    """Whether a placeholder is a parameter or buffer that Dynamo lifted out of the module."""
    if isinstance(value, torch.nn.Parameter):
        return True
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) or "_buffers_" in node.name


def bind_weights(gm: GraphModule, placeholders: list[Node], inputs: Sequence[Any], user: list[int]) -> GraphModule:
    """The graph with lifted weights turned back into attributes."""
    graph = torch.fx.Graph()
    root = torch.nn.Module()
    root._modules, root._parameters, root._buffers = dict(gm._modules), dict(gm._parameters), dict(gm._buffers)
    env: dict[Node, Node] = {}
    for i, node in enumerate(placeholders):
        if i not in user:
            name = f"_weight_{i}"
            if isinstance(inputs[i], torch.nn.Parameter):
                root.register_parameter(name, inputs[i])
            else:
                root.register_buffer(name, inputs[i])
            env[node] = graph.get_attr(name)
    for node in gm.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return GraphModule(root, graph)


def inner_backend(name: Any, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """The compiler for the rewritten graph."""
    if callable(name):
        return name
    if name == "eager":
        return lambda gm, inputs: gm
    if name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return lambda gm, inputs: compile_fx(gm, list(inputs), config_patches=dict(options or {}))
    from torch._dynamo import lookup_backend

    try:
        return lookup_backend(name)
    except Exception as error:
        raise InputError(f"inner={name!r} is not a torch.compile backend: {error}") from error
