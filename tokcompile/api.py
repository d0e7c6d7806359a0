"""`tokcompile.optimize` and what it returns."""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tokcompile.compiler import Compiled, Settings, analyse, compile_plan, settings_for
from tokcompile.errors import ExportError, InputError, MethodError, PlanError
from tokcompile.files import atomic
from tokcompile.passes.arguments import flat_caller
from tokcompile.passes.calls import erase_marks, unmarked
from tokcompile.passes.cost import terms
from tokcompile.passes.fixed import Fixed
from tokcompile.passes.fold import Folded
from tokcompile.passes.graph import finished
from tokcompile.passes.last_token import LastTokenSeen
from tokcompile.passes.plan import OUTPUTS, RECOVER, SAY_IT_THERE, Plan
from tokcompile.passes.renumber import Consecutive
from tokcompile.passes.saved import load_program
from tokcompile.passes.trace import one_at_a_time
from tokcompile.recipe import Recipe
from tokcompile.report import Report, make_report

FORMAT = 1


class ReducedOutput(NamedTuple):
    """What a model optimized with outputs="reduced" returns: the model's own output, short along its token axes, and
    for each space of tokens that shows in it the kept original indices (B, k) and, after merging, the sizes (B, k)."""

    output: Any
    kept: dict[str, Tensor]


class OptimizedModel(torch.nn.Module):
    """The model with token reduction compiled in; it is called, and answers, like the original.

    plan: the reductions that were carried out. report: what was found, done and what it costs.
    """

    def __init__(self, compiled: Compiled, spec: dict[str, Any], recipes: dict[str, Recipe] | None = None):
        super().__init__()
        analysis = compiled.analysis
        traced = analysis.traced
        # without reductions the untouched traced graph is kept: bit for bit the original
        self.graph_module = finished(compiled.rewritten.gm if compiled.rewritten else unmarked(traced.gm))
        self.graph_module.eval()
        self.plan = compiled.plan
        self.report: Report = make_report(analysis, compiled, terms(analysis.graph.graph, {}))
        self.input_names = [n.name for n in traced.gm.graph.nodes if n.op == "placeholder"]
        self.example_inputs = traced.inputs
        self.extra_outputs = compiled.rewritten.extra_outputs if compiled.rewritten else []
        self.kept_of = compiled.rewritten.kept_of if compiled.rewritten else {}
        self.output_names = [*traced.output_names, *self.extra_outputs]
        self._flatten = flat_caller(traced)
        self.folded = analysis.folded if compiled.rewritten else Folded()
        checks: list[Fixed | Consecutive | LastTokenSeen] = (
            [*analysis.fixed, *compiled.rewritten.checks] if compiled.rewritten else []
        )
        self._checks = checks
        self._in_spec, self._out_spec = traced.in_spec, traced.out_spec
        self._source, self.spec = traced.program, spec
        self._analysis, self._compiled, self.recipes = analysis, compiled, recipes or {}
        self._program: ExportedProgram | None = None
        self.original: tuple[torch.nn.Module, dict[str, Any]] | None = None  # a vision-language model and its example call
        super().train(False)

    def over(self, graph_module: GraphModule) -> OptimizedModel:
        """The same model over another form of its graph, which later calls, exports and saves go by."""
        other = type(self).__new__(type(self))  # `copy.copy` would save and load it
        other.__dict__ = {**self.__dict__, "_modules": dict(self._modules), "_program": None, "_source": None}
        other.graph_module = graph_module
        return other

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: InputError for inputs of another structure, shape or dtype than it was compiled for."""
        if not torch.compiler.is_dynamo_compiling():
            self.folded.check(call=True)
        inputs = self._flatten(*args, **kwargs)
        if not torch.compiler.is_compiling():
            for one in self._checks:
                one.check(inputs)
        values = self.graph_module(*inputs)
        count = len(values) - len(self.extra_outputs)
        output = pytree.tree_unflatten(values[:count], self._out_spec)
        if self.plan.outputs == "reduced":
            return ReducedOutput(output, dict(zip(self.extra_outputs, values[count:])))
        return output

    def train(self, mode: bool = True) -> OptimizedModel:
        """An optimized model is an inference program: only eval() is possible."""
        if mode:
            raise InputError("an optimized model is compiled for inference; train the original and optimize it again")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        """For `.to(device)` and the like. Raises: InputError for another dtype, in which nothing could be called."""
        for weight in (*self.parameters(), *self.buffers()):
            if fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype != weight.dtype:
                raise InputError("the dtype of an optimized model is fixed: convert the original, and optimize it again")
        return super()._apply(fn, recurse)

    @property
    def example_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that it was compiled for."""
        return pytree.tree_unflatten(self.example_inputs, self._in_spec)

    @property
    def frozen(self) -> list[str]:
        """What tracing fixed of values that are computed in the blocks: later calls check it, a file cannot."""
        return self.fixed_behind({b.mid.name for b in self._analysis.structure.blocks})

    def check_fixed(self, inputs: Sequence[Any]) -> None:
        """Raises: InputError where flat inputs differ from the example's in what was fixed, or weights have changed."""
        self.folded.check()
        for check in self._analysis.traced.checks:
            check(inputs)
        for one in self._checks:
            one.check(inputs)

    def fixed_behind(self, names: set[str]) -> list[str]:
        """What tracing fixed of values, other than conditions, that are computed from these nodes or inputs."""
        return [text for check in self._analysis.traced.checks for text in check.behind(names)]

    @property
    def renumbered(self) -> bool:
        """Whether tokens get new positions, without gaps, after a reduction."""
        return self._compiled.rewritten is not None and any(s.renumber for s in self._compiled.rewritten.spaces)

    @property
    @one_at_a_time
    def exported_program(self) -> ExportedProgram:
        """The optimized model as a torch.export program in portable ATen (for AOTInductor, ExecuTorch and the like)."""
        self.folded.check()
        if self._program is None:
            args, kwargs = self.example_call
            with torch.no_grad():
                self._program = torch.export.export(self, tuple(args), dict(kwargs), strict=False)
        return self._program

    def export_onnx(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Writes and verifies an ONNX file; see `tokcompile.exports.onnx.export_onnx`.

        A vision-language model that was optimized as a whole is written to a folder, in the parts that generate, where the path
        does not end in .onnx; see `tokcompile.vlm.export_whole`.
        """
        from tokcompile.exports.onnx import export_onnx

        if self.original is not None and not os.fspath(path).endswith(".onnx"):
            from tokcompile.vlm import export_whole

            return export_whole(self, path, **options)
        return export_onnx(self, path, **options)

    def build_engine(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Builds a TensorRT or TensorRT-RTX engine; see `tokcompile.exports.engine.build_engine`."""
        from tokcompile.exports.engine import build_engine

        return build_engine(self, path, **options)

    def bundle(self, path: str | os.PathLike[str], *, target: str, **options: Any) -> Any:
        """Writes a folder and archive to deploy on a device; see `tokcompile.exports.bundle.bundle`."""
        from tokcompile.exports.bundle import bundle

        return bundle(self, path, target=target, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and torch.save: the content of the file that `save` writes. Raises: ExportError, as `save`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.pt2")
            self.save(file)
            return from_bytes, (file.read_bytes(),)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the original program and the plan in one `.pt2`, from which `tokcompile.load` makes this model again.

        Raises: ExportError; nothing is left behind then.
        """
        if self._source is None:
            raise ExportError("a model optimized inside torch.compile has no exported program to save")
        if self.report.traced_again:
            raise ExportError(
                f"{self.report.traced_again[0]} was traced again over fewer tokens, which takes the model itself and not its "
                "exported program\n  what to do: torch.export.save(optimized.exported_program, path); or save the plan "
                "(optimized.plan.save) and optimize the model with it again"
            )
        erase_marks(self._source.graph)
        spell_casts(self._source.graph)
        data = json.dumps({"format": FORMAT, "plan": json.loads(self.plan.json()), **self.spec})
        with atomic(path) as temporary:
            try:
                torch.export.save(self._source, temporary, extra_files={"tokcompile.json": data})
            except RuntimeError as error:
                raise ExportError(
                    f"torch.export.save of torch {torch.__version__} cannot write this program: {error}\n  what to do: try a "
                    "newer torch; or save the plan (optimized.plan.save) and optimize the model with it again"
                ) from error


def spell_casts(graph: torch.fx.Graph) -> None:
    """Up to torch 2.11, checks of values turn a condition into 1 or 0 by a function that its own files cannot hold; `sym_ite`
    does the same, and later versions use it."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", None) == "cast_symbool_to_symint_guardless":
            node.target, node.args = torch.sym_ite, (*node.args, 1, 0)


@one_at_a_time
def optimize(
    model: Any,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    method: str | Recipe = "tome",
    budget: Any = 0.5,
    where: Sequence[int | str] | int | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    outputs: str = "keep",
    plan: Plan | str | os.PathLike[str] | None = None,
    recover: str = "end",
    size_weighted_mean: bool = True,
    **method_options: Any,
) -> OptimizedModel:
    """Compiles static token reduction into a model.

    model: an nn.Module in eval mode, an ExportedProgram, the path of a `.pt2`, or an OptimizedModel, to whose reductions
    later ones are added (first in the vision tower, then inside the language model). args, kwargs: example inputs, which fix
    every shape. method: a name from `tokcompile.methods()` or a Recipe. budget: a share of the patch tokens in (0, 1], or
    Tokens, Flops, KeepRate, Remove, Schedule. where: blocks (numbers or module paths), the method's own by default.
    spans: the (start, stop) of the visual tokens, where the graph does not say. outputs: "keep" (names, order and shapes
    of the original) or "reduced" (short, with kept indices and sizes). plan: a Plan (or its file), which says method, budget,
    where, outputs and recover itself. recover: "end" (give dropped tokens back only after the last block), "anywhere" or
    "never". size_weighted_mean: whether mean pooling over merged tokens weighs them by size. method_options: the method's
    own; and renumber=True or False, whether the tokens of a language model get positions without gaps after a reduction, or
    keep theirs; by default as the method is published, where all positions are one number each; and drop_layer, the layer of a
    language model, by number or share of the depth, at whose entrance all visual tokens that are left go.

    Raises: InputError, MethodError, BudgetError, PlanError, TraceError, UnsupportedGraph.

    Example:
        >>> import torch, tokcompile
        >>> from torch import nn
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 4).eval()
        >>> fast = tokcompile.optimize(model, (torch.randn(1, 50, 32),), method="random", budget=0.5)
        >>> fast(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """
    for name, value, allowed in (("outputs", outputs, OUTPUTS), ("recover", recover, RECOVER)):
        if value not in allowed:
            raise InputError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if plan is not None:
        if not isinstance(plan, Plan):
            raise PlanError(f"plan must be a tokcompile.Plan or the path of one, not {type(plan).__name__}")
        refuse_beside(plan, method=method, budget=budget, where=where, outputs=outputs, recover=recover)
        method, method_options = plan.method if isinstance(method, str) else method, {**plan.options, **method_options}
        outputs, recover = plan.outputs, plan.recover
    settings = settings_for(
        method, method_options, outputs=outputs, recover=recover, size_weighted_mean=size_weighted_mean, spans=spans
    )
    where = [where] if isinstance(where, (int, str)) else where
    if where is not None and not isinstance(where, Iterable):
        raise InputError(f"where={where!r} is no block, nor a list of blocks")
    first = model if isinstance(model, OptimizedModel) else None
    if first is not None:
        refuse_again(first, args, kwargs, plan, settings)
        settings.recipes = first.recipes
    analysis = first._analysis if first is not None else analyse(model, args, kwargs)
    compiled = compile_plan(analysis, settings, budget, where, plan, first._compiled if first is not None else None)
    recipes = {**(settings.recipes), settings.recipe.name: settings.recipe}
    made = OptimizedModel(compiled, {"size_weighted_mean": size_weighted_mean}, recipes)
    made.original = first.original if first is not None else call_of(model, args, kwargs)
    return made


def call_of(model: Any, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> Any:
    """A vision-language model and the tensors of its example call by name, by which it is taken apart; None for others."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_input_embeddings"):
        return None
    named = {**dict(zip(inspect.signature(model.forward).parameters, args or ())), **(kwargs or {})}
    tensors = {name: v for name, v in named.items() if isinstance(v, torch.Tensor)}
    return (model, tensors) if "input_ids" in tensors and any(v.is_floating_point() for v in tensors.values()) else None


def refuse_beside(plan: Plan, **given: Any) -> None:
    """What is asked beside a plan, other than what it says, would be ignored. Raises: PlanError."""
    defaults = inspect.signature(optimize).parameters
    other = [
        name
        for name, value in given.items()
        if value != defaults[name].default and value != getattr(plan, name, None) and not isinstance(value, Recipe)
    ]
    if other:
        raise PlanError(f"a plan was passed, which says {', '.join(other)} itself: {SAY_IT_THERE}")


def refuse_again(first: OptimizedModel, args: Any, kwargs: Any, plan: Plan | None, settings: Settings) -> None:
    """What cannot be asked of a model that is optimized already. Raises: InputError, PlanError."""
    first.folded.check()
    if args is not None or kwargs:
        raise InputError("an optimized model brings its example inputs along: leave args and kwargs out")
    if plan is not None:
        raise PlanError("a plan is for the original model: pass that one, not an optimized one")
    if first.plan.reductions and (first.plan.outputs, first.spec["size_weighted_mean"]) != (
        settings.outputs,
        settings.size_weighted_mean,
    ):
        raise InputError(
            f"the model was optimized with outputs={first.plan.outputs!r} and size_weighted_mean="
            f"{first.spec['size_weighted_mean']}: pass the same again"
        )


def load(path: str | os.PathLike[str]) -> OptimizedModel:
    """Loads a model that `OptimizedModel.save` wrote.

    Raises: ExportError for a missing, corrupt or foreign file; MethodError where its method is not registered here.
    """
    extra = {"tokcompile.json": ""}
    program = load_program(os.fspath(path), extra)
    if not extra["tokcompile.json"]:
        raise ExportError(
            f"{os.fspath(path)} is an exported program, but not one that OptimizedModel.save wrote: "
            "pass it to tokcompile.optimize instead"
        )
    data, plan = read_spec(os.fspath(path), extra["tokcompile.json"])
    try:
        return optimize(program, plan=plan, method=plan.method, size_weighted_mean=data["size_weighted_mean"])
    except MethodError as error:
        raise MethodError(f"{os.fspath(path)} uses the method {plan.method!r}: {error}; register it before loading") from error


def from_bytes(content: bytes) -> OptimizedModel:
    """Loads what `save` wrote to a file of this content. Raises: see `load`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt2")
        file.write_bytes(content)
        return load(file)


def read_spec(path: str, text: str) -> tuple[Mapping[str, Any], Plan]:
    """What `save` wrote beside the program. Raises: ExportError."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ExportError(f"{path} has format {data['format']!r}; this release reads format {FORMAT}")
        return {"size_weighted_mean": bool(data["size_weighted_mean"])}, Plan.from_json(json.dumps(data["plan"]))
    except (json.JSONDecodeError, KeyError, TypeError, PlanError) as error:
        raise ExportError(f"{path} was written by OptimizedModel.save, but its tokcompile.json is damaged: {error}") from error
