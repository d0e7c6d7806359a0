"""What each command does: arguments in, a `Result` out."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import tokcompile
from tokcompile.bench import Row
from tokcompile.bench import bench as run_bench
from tokcompile.cli import values
from tokcompile.cli.show import Result, Table, note
from tokcompile.compiler import Analysis, analyse
from tokcompile.errors import InputError, TokcompileError
from tokcompile.files import atomic
from tokcompile.models import Named, load_model
from tokcompile.passes.cost import terms, total
from tokcompile.passes.places import visual_blocks
from tokcompile.recipe import Recipe, get_method
from tokcompile.recipe import methods as known_methods


def named(args: Namespace) -> Named:
    return load_model(args.model, args.input, args.batch, args.weights)


def spans(args: Namespace) -> list[tuple[int, int]] | None:
    return [values.span(text) for text in args.span] or None


def common(args: Namespace) -> dict[str, Any]:
    """The arguments of `tokcompile.optimize` that are the same for every method."""
    given = {
        "where": values.blocks(args.where) if args.where else None,
        "spans": spans(args),
        "outputs": args.outputs,
        "recover": args.recover,
        "size_weighted_mean": False if args.plain_mean else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def optimize(args: Namespace) -> Result:
    """Compiles, saves what was asked for, and shows the plan and the report."""
    values.check_writable(args.save, args.save_plan, args.onnx)
    optimized = optimize_as_asked(args)
    data = {
        "model": args.model,
        "plan": json.loads(optimized.plan.json()),
        "report": json.loads(optimized.report.json()),
        "files": {},
    }
    parts: list[Any] = [optimized.plan, "", optimized.report]
    for kind, path, report in write(optimized, args):
        data["files"][kind] = json.loads(report.json()) if report else {"path": path}
        parts.append(f"{kind}: {report or path}")
    return Result(data, parts)


def optimize_as_asked(args: Namespace) -> tokcompile.OptimizedModel:
    """The model with the reductions that the arguments or the plan file say."""
    wanted = common(args)
    if args.plan:
        wanted["plan"] = tokcompile.Plan.load(args.plan)
    else:
        wanted |= values.reduction(args.method or "tome", args.budget, args.where, args.option)
    return tokcompile.optimize(*named(args), **wanted)


def write(optimized: tokcompile.OptimizedModel, args: Namespace) -> list[tuple[str, str, Any]]:
    """(kind, path, report if there is one) of every file written."""
    written: list[tuple[str, str, Any]] = []
    if args.save_plan:
        with atomic(args.save_plan) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(optimized.plan.json() + "\n")
        written.append(("plan", args.save_plan, None))
    if args.save:
        optimized.save(args.save)
        written.append(("model", args.save, None))
    if args.onnx:
        options = {"target": args.target} if args.target else {}
        written.append(("onnx", args.onnx, optimized.export_onnx(args.onnx, inline=args.inline, **options)))
    return written


def build(args: Namespace) -> Result:
    """Builds an engine."""
    values.check_writable(args.engine)
    profiles = values.profile(args.profile) if args.profile else None
    report = optimize_as_asked(args).build_engine(
        args.engine, backend=args.backend, target=args.target, precision=args.precision, plugins=args.plugins,
        plugin_library=args.plugin_library, compute_capabilities=args.compute_capability, profiles=profiles,
    )  # fmt: skip
    return Result({"model": args.model, **json.loads(report.json())}, [report, *(f"warning: {w}" for w in report.warnings)])


def bundle(args: Namespace) -> Result:
    """Writes a bundle for a device."""
    from tokcompile.exports.trtexec import get_device

    get_device(args.target)  # before any work is done
    values.check_folder(args.out, args.overwrite)
    report = optimize_as_asked(args).bundle(
        args.out, target=args.target, precision=args.precision, form=args.form, name=args.name,
        plugin_library=args.plugin_library, archive=not args.no_archive, overwrite=args.overwrite,
    )  # fmt: skip
    return Result({"model": args.model, **json.loads(report.json())}, [report, f"next: {report.path}/README.md"])


def inspect(args: Namespace) -> Result:
    """Shows what passes 1 to 3 found."""
    analysis = analyse(*named(args))
    structure = analysis.structure
    flops = total(terms(analysis.graph.graph, {}))
    try:
        visual, hint = [b.index for b in visual_blocks(structure, None)] if structure.blocks else [], ""
    except TokcompileError as error:
        visual, hint = [], str(error)
    rows = blocks_found(analysis)
    data = {
        "model": args.model,
        "inputs": inputs_found(analysis),
        "flops": flops,
        "blocks": rows,
        "visual": visual,
        "sites": [b.index for b in structure.sites()],
        "refused": [{"block": b.index, "path": b.path, "reason": b.why_not} for b in structure.blocks if b.why_not],
        "unrecognised": structure.unrecognised,
        "hint": hint,
        "guards": analysis.guards,
        "seconds": analysis.seconds,
    }
    headers = ("block", "tokens", "prefix", "visual", "suffix", "grid", "module", "reducible")
    lines = [
        (*(str(r[name]) for name in ("block", "length", "prefix", "n", "suffix")),
         "x".join(map(str, r["grid"] or "-")), r["path"] or "-", f"no: {r['why_not']}" if r["why_not"] else "yes")
        for r in rows
    ]  # fmt: skip
    parts: list[Any] = [f"{args.model}: {', '.join(data['inputs'])}; {flops / 1e9:.3f} GFLOPs; {len(rows)} blocks"]
    if rows:
        parts.append(Table(headers, lines, headers[:5]))
        parts.append(f"reducible at {len(data['sites'])} blocks; by default methods choose among {ranges(visual)}")
    else:
        parts.append("no residual attention block was found: tokcompile has nothing to reduce here")
    parts += [f"note: {text}" for text in [hint] if text]
    parts += [f"not recognised: {text}" for text in structure.unrecognised]
    parts += [f"fixed while tracing: {text}" for text in analysis.guards]
    return Result(data, parts)


def blocks_found(analysis: Analysis) -> list[dict[str, Any]]:
    return [
        {"block": b.index, "path": b.path, "length": b.stage.length, "prefix": b.stage.prefix, "n": b.stage.n,
         "suffix": b.stage.suffix, "grid": list(b.stage.grid) if b.stage.grid else None, "visual": b.stage.visual,
         "text": b.stage.text, "parallel": b.parallel, "causal": any(a.causal for a in b.attentions),
         "attentions": len(b.attentions), "why_not": b.why_not}
        for b in analysis.structure.blocks
    ]  # fmt: skip


def inputs_found(analysis: Analysis) -> list[str]:
    names = [n.name for n in analysis.traced.gm.graph.nodes if n.op == "placeholder"]
    out = []
    for name, value in zip(names, analysis.traced.inputs, strict=True):
        kind = str(value.dtype).removeprefix("torch.") if hasattr(value, "dtype") else repr(value)
        out.append(f"{name} {'x'.join(map(str, value.shape))} {kind}" if hasattr(value, "shape") else f"{name} {kind}")
    return out


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none of them"


def check(args: Namespace) -> Result:
    """Runs the oracles; the exit code is 1 where one fails."""
    chosen = values.blocks(args.blocks) if args.blocks else None
    if chosen and not all(isinstance(b, int) for b in chosen):
        raise InputError(f"--blocks takes numbers such as 0,6,11, not {args.blocks!r}")
    found = tokcompile.check(*named(args), spans=spans(args), blocks=chosen, seed=args.seed)  # type: ignore[arg-type]
    return Result({"model": args.model, **json.loads(found.json())}, [found], 0 if found.ok else 1)


def methods(args: Namespace) -> Result:
    """Lists the registered methods."""
    known = known_methods()
    data = {name: method_data(recipe) for name, recipe in known.items()}
    rows = [
        (name, ", ".join(m["reads"]), m["place"], m["steps"], equations(m["options"]), m["paper"]) for name, m in data.items()
    ]
    return Result(data, [Table(("method", "reads", "place", "steps", "options", "paper"), rows)])


def equations(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())


def method_data(recipe: Recipe) -> dict[str, Any]:
    """steps: the blocks of 12, and how the counts fall; rate: the rounding rule of keep-rate budgets."""
    steps, depth = recipe.steps, 12
    chosen = list(steps.blocks(depth))
    several = len(chosen) > 1
    where = "every block" if len(chosen) == depth else f"block{'s' * several} {', '.join(map(str, chosen))} of {depth}"
    spread = f", {title(steps.counts)}" if several else ""
    return {
        "reads": list(recipe.taps),
        "place": recipe.place,
        "steps": where + spread,
        "blocks_of_12": chosen,
        "rate": title(steps.rate),
        "merges": recipe.track_size,
        "proportional": recipe.proportional,
        "options": dict(recipe.options),
        "paper": recipe.paper,
    }


def title(function: Any) -> str:
    return str(getattr(function, "__name__", function)).replace("_", " ")


def bench(args: Namespace) -> Result:
    """Times the methods; what could not be built is an error at the end."""
    budgets = [values.budget(text) for text in args.budget or ["0.5"]]
    chosen = [get_method(name) for name in split(args.method or ["tome"])]
    given = values.options(args.option)
    for recipe in chosen:
        recipe.with_options({k: v for k, v in given.items() if k in recipe.options})
    found = run_bench(
        *named(args), methods=chosen, budgets=budgets, runtimes=split(args.runtime or ["eager"]), pairs=args.pairs,
        threads=args.threads, options=given, say=note, **common(args),
    )  # fmt: skip
    setting = {k: ", ".join(v) if isinstance(v, list) else v for k, v in found.machine.items()}
    parts: list[Any] = ["; ".join(f"{k} {v}" for k, v in setting.items())]
    parts += [f"A/A {runtime}: {ratio}" for runtime, ratio in found.aa.items()]
    parts.append(Table(COLUMNS, [cells(row) for row in found.rows], COLUMNS[4:]))
    if found.errors:
        parts += [f"not timed: {text}" for text in found.errors]
        note("error: " + "\n".join(found.errors))
    return Result({"model": args.model, **found.data()}, parts, 2 if found.errors else 0)


COLUMNS = (
    "runtime", "method", "budget", "tokens left",
    "FLOPs", "ratio", "quartiles", "overhead", "random", "selection", "ms", "of",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    numbers = [
        f"{row.flops_ratio:.3f}", f"{row.ratio:.3f}", f"{row.low:.3f}-{row.high:.3f}", f"{row.overhead:+.3f}",
        f"{row.random_ratio:.3f}", f"{row.selection:+.3f}", f"{row.optimized_ms:.2f}", f"{row.original_ms:.2f}",
    ]  # fmt: skip
    return [row.runtime, row.method, row.budget, counts(row.counts), *numbers]


def split(texts: list[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def counts(numbers: list[int]) -> str:
    """All counts of a few, the first and the last of many."""
    return ", ".join(map(str, numbers)) if len(numbers) <= 3 else f"{numbers[0]} .. {numbers[-1]}"


def demo(args: Namespace) -> Result:
    """Hands over to the demo."""
    try:
        run = importlib.import_module("tokcompile.demo.run")
    except ImportError as error:
        raise TokcompileError(f"the demo needs pip install 'tokcompile[demo]' ({error})") from error
    return Result(run.main(args))
