"""Paired timing in one process: an optimized model beside its original, with the A/A pair and random selection."""

from __future__ import annotations

import gc
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokcompile.api import OptimizedModel, optimize
from tokcompile.budget import as_budget, to_data
from tokcompile.errors import ExportError, InputError, MethodError, TokcompileError
from tokcompile.passes.trace import trace
from tokcompile.recipe import Recipe, get_method

RUNTIMES = ("eager", "inductor", "onnxruntime")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Time of b over time of a: median and quartiles over the pairs; a, b: median seconds of one call each."""

    median: float
    low: float
    high: float
    a: float
    b: float
    pairs: int
    calls: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired(
    run_a: Run,
    run_b: Run,
    pairs: int = 15,
    *,
    warmup: int = 2,
    least: float = 0.02,
    clock: Callable[[], float] = time.process_time,
    title: str = "",
) -> Ratio:
    """Times b against a in alternating pairs (ab, ba, ab, ...) and takes the median of the ratios within pairs.

    least: seconds that one measurement lasts at least, by calling several times. clock: CPU time of this process by
    default; on other devices pass one that waits for the device. title: shown with the progress bar on a terminal.

    Example:
        >>> from tokcompile.bench import paired
        >>> ratio = paired(lambda: sum(range(1000)), lambda: sum(range(4000)), pairs=3, least=0.001)
        >>> ratio.median > 1
        True
    """
    if pairs < 1:
        raise InputError(f"at least one pair has to be timed, not {pairs}")
    for _ in range(warmup):
        run_a()
        run_b()
    once = max(measure(run_a, 1, clock), 1e-7)
    calls = max(1, round(least / once))
    times = np.empty((pairs, 2))
    with no_collection():
        for i in track(range(pairs), title):
            for j in (0, 1) if i % 2 == 0 else (1, 0):
                times[i, j] = max(measure((run_a, run_b)[j], calls, clock), 1e-9) / calls
    low, median, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    a, b = np.median(times, axis=0)
    return Ratio(float(median), float(low), float(high), float(a), float(b), pairs, calls)


def measure(run: Run, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of the measurements."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def track(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr where that is a terminal and rich is installed."""
    if not title or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress
    except ImportError:
        return items

    def bar() -> Iterator[Any]:
        # drawn between measurements only: a refreshing thread would count as CPU time of this process
        with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
            task = progress.add_task(escape(title), total=len(items))
            for item in items:
                progress.refresh()
                yield item
                progress.advance(task)

    return bar()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with so many threads for torch."""
    if count < 1:
        raise InputError(f"the number of threads is a positive number, not {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        plain = optimize(source, args, kwargs, method="random", budget=1.0)
        result.machine["inputs"] = [shape_text(v) for v in plain.example_inputs if isinstance(v, torch.Tensor)]
        cases = list(build(result, say, source, args, kwargs, recipes, budgets, options or {}, common))
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
    result: Bench, say: Callable[[str], None], model: Any, args: Any, kwargs: Any, recipes: Sequence[Recipe],
    budgets: Sequence[Any], options: Mapping[str, Any], common: dict[str, Any],
) -> Iterator[tuple[str, str, OptimizedModel, OptimizedModel]]:  # fmt: skip
    """(method, budget, optimized model, random selection at the same counts), for all that can be built."""
    weighted = {k: v for k, v in common.items() if k == "size_weighted_mean"}  # the plan says all the rest
    twins: dict[Any, OptimizedModel] = {}
    for budget in budgets:
        for recipe in recipes:
            title = budget_name(budget)
            say(f"compiling {recipe.name} at {title}")
            own = {k: v for k, v in options.items() if k in recipe.options}
            try:
                made = optimize(model, args, kwargs, method=recipe, budget=budget, **common, **own)
                if recipe.name == "random":
                    twins[places(made)] = made
                elif places(made) not in twins:
                    plan = made.plan.replace(method="random", options={})
                    twins[places(made)] = optimize(model, args, kwargs, plan=plan, **weighted)
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
