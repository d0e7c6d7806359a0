"""Benchmarks: an optimized model beside its original, with the A/A pair and random selection."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokcompile.api import OptimizedModel, optimize
from tokcompile.budget import as_budget, to_data
from tokcompile.errors import ExportError, InputError, MethodError, TokcompileError
from tokcompile.passes.trace import trace
from tokcompile.recipe import Recipe, get_method
from tokcompile.timing import Ratio, Run, paired, torch_threads

RUNTIMES = ("eager", "inductor", "onnxruntime")


def runner(model: OptimizedModel, runtime: str, count: int = 1) -> Run:
    """A function without arguments that runs the model once on its example inputs."""
    if runtime == "onnxruntime":
        return onnx_runner(model, count)
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
    program: Any = model.graph_module if runtime == "eager" else torch.compile(model.graph_module, dynamic=False)
    return no_grad(program, model.example_inputs)


def no_grad(program: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return program(*args, **(kwargs or {}))

    return run


def onnx_runner(model: OptimizedModel, count: int) -> Run:
    """Exports the model to a temporary folder and runs it in onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"the runtime onnxruntime needs pip install 'tokcompile[onnx]' ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = count, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is no CPU time
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export_onnx(path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = onnx_feed(model, [i.name for i in session.get_inputs()])
    return lambda: session.run(None, feed)


def onnx_feed(model: OptimizedModel, names: Sequence[str]) -> dict[str, Any]:
    """The example inputs under the names that the file gives them, else in order."""
    tensors = {n: v for n, v in zip(model.input_names, model.example_inputs, strict=True) if isinstance(v, torch.Tensor)}
    values = [tensors[n] for n in names] if set(names) <= set(tensors) else list(tensors.values())
    return {n: v.detach().cpu().numpy() for n, v in zip(names, values, strict=True)}


def original_runner(model: Any, args: Any, kwargs: Any, plain: OptimizedModel, runtime: str, count: int) -> Run:
    """The original in the form that the optimized one has; in eager mode that is the user's own module."""
    if runtime == "eager" and isinstance(model, torch.nn.Module):
        return no_grad(model, args or (), kwargs)
    return runner(plain, runtime, count)


@dataclass
class Row:
    """One method at one budget in one runtime.

    overhead: measured ratio - FLOPs ratio. random_ratio: the ratio of random selection at the same blocks and counts;
    selection: what choosing and merging adds to that.
    """

    runtime: str
    method: str
    budget: str
    counts: list[int]
    flops_ratio: float
    ratio: float
    low: float
    high: float
    overhead: float
    random_ratio: float
    selection: float
    original_ms: float
    optimized_ms: float


@dataclass
class Bench:
    """aa: per runtime the ratio of the original to itself, which is the noise. errors: what was not timed, and why."""

    machine: dict[str, Any]
    pairs: int
    aa: dict[str, Ratio] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        return asdict(self)


def machine(count: int) -> dict[str, Any]:
    """What a time is worth nothing without."""
    found: dict[str, Any] = {"processor": processor(), "threads": count, "torch": torch.__version__}
    try:
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
    except ImportError:
        pass
    return found


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def budget_name(budget: Any) -> str:
    """0.5, Tokens(k=98), Remove(r=16, inflect=0.0) and so on."""
    data = to_data(as_budget(budget))
    kind = data.pop("kind")
    return str(data["share"]) if kind == "Share" else f"{kind}({', '.join(f'{k}={v}' for k, v in data.items())})"


def bench(
    model: Any,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    methods: Sequence[str | Recipe] = ("tome",),
    budgets: Sequence[Any] = (0.5,),
    runtimes: Sequence[str] = ("eager",),
    pairs: int = 15,
    threads: int = 1,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **common: Any,
) -> Bench:
    """Times the original against every method at every budget; random selection always comes first.

    threads: of torch and onnxruntime. options: method options, each for the methods that have it. say: is told what is
    being done. common: where, spans, outputs, recover and size_weighted_mean of `tokcompile.optimize`. What cannot be
    built is noted in `errors` and the rest is still timed.

    Raises: InputError, MethodError, TraceError, UnsupportedGraph.
    """
    wrong = [r for r in runtimes if r not in RUNTIMES]
    if wrong:
        raise InputError(f"runtime {wrong[0]!r} is none of {', '.join(RUNTIMES)}")
    recipes = checked(methods, options or {})
    if pairs < 1:
        raise InputError(f"at least one pair has to be timed, not {pairs}")
    result = Bench(machine(threads), pairs)
    with torch_threads(threads):
        say("tracing the original")
        source = trace(model, args, kwargs).program or model  # traced once, for all methods
        make = partial(optimize, source, args, kwargs)
        plain = make(method="random", budget=1.0)
        result.machine["inputs"] = [shape_text(v) for v in plain.example_inputs if isinstance(v, torch.Tensor)]
        cases = list(build(result, say, make, recipes, budgets, options or {}, common))
        for runtime in runtimes:
            say(f"{runtime}: A/A")
            original = original_runner(model, args, kwargs, plain, runtime, threads)
            result.aa[runtime] = paired(original, original, pairs, title=f"{runtime} A/A")
            timed: dict[Any, Ratio] = {}
            for name, budget, optimized, twin in cases:
                try:
                    for one in (twin, optimized):
                        if key(one) not in timed:
                            say(f"{runtime}: {one.plan.method} at the counts of {name} {budget}")
                            run = runner(one, runtime, threads)
                            timed[key(one)] = paired(original, run, pairs, title=f"{runtime} {name} {budget}")
                except TokcompileError as error:
                    result.errors.append(f"{name} at {budget} in {runtime}: {error}")
                    continue
                result.rows.append(row(runtime, name, budget, optimized, timed[key(optimized)], timed[key(twin)]))
    return result


def build(
    result: Bench, say: Callable[[str], None], make: Callable[..., OptimizedModel], recipes: Sequence[Recipe],
    budgets: Sequence[Any], options: Mapping[str, Any], common: dict[str, Any],
) -> Iterator[tuple[str, str, OptimizedModel, OptimizedModel]]:  # fmt: skip
    """(method, budget, optimized model, random selection at the same counts), for all that `make` can build."""
    weighted = {k: v for k, v in common.items() if k == "size_weighted_mean"}  # the plan says all the rest
    twins: dict[Any, OptimizedModel] = {}
    for budget in budgets:
        for recipe in recipes:
            title = budget_name(budget)
            say(f"compiling {recipe.name} at {title}")
            own = {k: v for k, v in options.items() if k in recipe.options}
            try:
                made = make(method=recipe, budget=budget, **common, **own)
                if recipe.name == "random":
                    twins[places(made)] = made
                elif places(made) not in twins:
                    plan = made.plan.replace(method="random", options={})
                    twins[places(made)] = make(plan=plan, **weighted)
            except TokcompileError as error:
                result.errors.append(f"{recipe.name} at {title}: {error}")
                continue
            yield recipe.name, title, made, twins[places(made)]


def checked(methods: Sequence[str | Recipe], options: Mapping[str, Any]) -> list[Recipe]:
    """Random and the methods. Raises: MethodError for unknown ones and for options that none of them has."""
    recipes = list({r.name: r for r in map(get_method, ("random", *methods))}.values())
    for name in options:
        if not any(name in r.options for r in recipes):
            raise MethodError(f"none of {', '.join(r.name for r in recipes)} has an option {name!r}")
    return recipes


def places(model: OptimizedModel) -> Any:
    return tuple((r.block, r.place, r.n, r.k, r.unit) for r in model.plan.reductions)


def key(model: OptimizedModel) -> Any:
    """Equal programs are timed once."""
    return model.plan.method, tuple(sorted(map(repr, model.plan.options.items()))), places(model)


def shape_text(value: torch.Tensor) -> str:
    return f"{'x'.join(map(str, value.shape))}:{str(value.dtype).removeprefix('torch.')}"


def row(runtime: str, name: str, budget: str, model: OptimizedModel, ratio: Ratio, twin: Ratio) -> Row:
    counts, flops = [r.k * r.unit for r in model.plan.reductions], model.report.flops_ratio
    return Row(
        runtime, name, budget, counts, flops, ratio.median, ratio.low, ratio.high, ratio.median - flops, twin.median,
        ratio.median - twin.median, ratio.a * 1e3, ratio.b * 1e3,
    )  # fmt: skip
