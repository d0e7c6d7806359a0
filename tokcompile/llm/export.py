"""A reduced prefill and its decode step as files: prefill.onnx, decode.onnx, embeddings.npy, and generate.json, which says
how they fit together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokcompile.api import OptimizedModel
from tokcompile.errors import ExportError
from tokcompile.exports.verify import TOLERANCES
from tokcompile.files import atomic_folder
from tokcompile.llm.folder import FORMAT, SPEC, load
from tokcompile.llm.generate import Generated, Generator, Wiring
from tokcompile.llm.tokenizer import TOKENIZER
from tokcompile.passes.faithful import relative_error

CHUNK = 4096  # rows of the embedding table that are computed at a time


@dataclass
class FolderReport:
    """What was written. files: by their part. errors: relative error of each graph in onnxruntime. error: of the logits of
    the first `steps` generated tokens, the graphs running as one."""

    path: str
    files: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    bytes: int = 0
    stages: list[dict[str, int]] = field(default_factory=list)
    steps: int = 0
    error: float = 0.0

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        held = ", ".join(f"layers {s['first']}-{s['last']} {s['length']} of {s['capacity']}" for s in self.stages)
        checked = f"{self.steps} tokens in onnxruntime, relative error {self.error:.1e}" if self.steps else "not verified"
        return f"{self.path}: {', '.join(self.files.values())}, {self.bytes / 1e6:.1f} MB; caches: {held}; {checked}"


def export(
    prefill: OptimizedModel,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_new_tokens: int,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verify_tokens: int = 4,
    tolerance: float | None = None,
    **options: Any,
) -> FolderReport:
    """Writes everything that generation needs into a new folder, and generates from it before it gets its name.

    prefill: what `tokcompile.optimize` gave for `tokcompile.llm.Prefill(model)` with outputs="reduced". tokenizer: the
    model's tokenizer.json, with which `tokcompile generate` takes a text. options: of
    `tokcompile.exports.onnx.export_onnx`, for both graphs, such as target="tensorrt_rtx" or inline=True. verify_tokens: how
    many tokens are generated in onnxruntime and compared with PyTorch; 0 for none.

    Raises: InputError, TraceError, ExportError; nothing is left behind then.
    """
    check_tokenizer(tokenizer)
    made = Generator(prefill, model, max_new_tokens=max_new_tokens)
    check_runs(made, options, verify_tokens)
    report = FolderReport(os.fspath(folder))
    with atomic_folder(folder, overwrite) as inside:
        write_graphs({"prefill": prefill, "decode": made.decode}, inside, report, options)
        write_embeddings(model, os.path.join(inside, report.files["embeddings"]))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, os.path.join(inside, TOKENIZER))
        with open(os.path.join(inside, SPEC), "w", encoding="utf-8") as file:
            file.write(spec_json(made.wiring, prefill, report.files) + "\n")
        if verify_tokens:
            names = zip(prefill.input_names, prefill.example_inputs)
            inputs: dict[str, Any] = {name: value for name, value in names if isinstance(value, Tensor)}
            count = min(verify_tokens, max_new_tokens)
            verify(partial(made, **inputs), partial(load(inside), **inputs), count, limit_of(tolerance, made, options), report)
        finish(report, inside, made.wiring)
    return report


def check_tokenizer(path: str | os.PathLike[str] | None) -> None:
    """Raises: ExportError."""
    if path is not None and not os.path.isfile(path):
        raise ExportError(f"there is no file {os.fspath(path)}: tokenizer is the path of the model's {TOKENIZER}")


def write_graphs(graphs: Mapping[str, OptimizedModel], folder: str, report: FolderReport, options: Mapping[str, Any]) -> None:
    """Writes each graph under its name, checked in onnxruntime. Raises: ExportError."""
    for name, graph in graphs.items():
        written = graph.export_onnx(os.path.join(folder, f"{name}.onnx"), **options)
        # of two forms, the one that onnxruntime runs
        report.files[name] = os.path.basename(written.files.get("plain", written.path))
        report.errors[name] = written.error
    report.files["embeddings"] = "embeddings.npy"


def finish(report: FolderReport, folder: str, wiring: Wiring) -> None:
    report.bytes = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    report.stages = [{"first": s.first, "last": s.last, "length": s.length, "capacity": s.capacity} for s in wiring.stages]


def limit_of(tolerance: float | None, made: Generator, options: Mapping[str, Any]) -> float:
    """The relative error that logits may have."""
    half = options.get("precision") is not None or kind_of(made) != torch.float32
    return TOLERANCES[torch.float16 if half else torch.float32] if tolerance is None else tolerance


def kind_of(made: Generator) -> torch.dtype:
    """The type of the model's floats, which is that of its caches."""
    given = dict(zip(made.decode.input_names, made.decode.example_inputs))
    kind: torch.dtype = given[made.wiring.caches[0][2]].dtype
    return kind


def check_runs(made: Generator, options: Mapping[str, Any], verify_tokens: int) -> None:
    """Raises: ExportError for what onnxruntime could not generate from."""
    if verify_tokens and (kind_of(made) == torch.bfloat16 or options.get("precision") == "bf16"):
        raise ExportError(
            "the model is bfloat16, in which onnxruntime does not compute on a CPU, so that nothing could be generated from "
            "the files\n  what to do: model.half() or model.float() before it is optimized; or verify_tokens=0 to write the "
            "files, unchecked, for another runtime"
        )


def write_embeddings(model: Any, path: str) -> None:
    """The table of token embeddings as the decoder takes them: some models scale them inside of the embedding module."""
    module = model.get_input_embeddings()
    weight = module.weight
    count = int(weight.shape[0])
    table = None
    for start in range(0, count, CHUNK):
        ids = torch.arange(start, min(start + CHUNK, count), device=weight.device)
        with torch.no_grad():
            rows = module(ids).float().cpu().numpy()
        if table is None:
            table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, rows.shape[-1]))
        table[start : start + len(rows)] = rows
    if table is not None:
        table.flush()


def verify(
    torch_side: Callable[..., Generated], files: Callable[..., Generated], count: int, tolerance: float, report: FolderReport
) -> None:
    """Generates from the files what PyTorch generates. Raises: ExportError."""
    want = torch_side(max_new_tokens=count, eos=(), keep_logits=True)
    got = files(max_new_tokens=count, eos=(), keep_logits=True)
    for step, (a, b) in enumerate(zip(got.logits, want.logits)):
        off = relative_error(a.float(), b.float().cpu())
        report.error = max(report.error, off)
        if not off <= tolerance:
            raise ExportError(
                f"verification failed: the logits of generated token {step} are off by {off:.2e} of their largest value, more "
                f"than the tolerance {tolerance:.0e}\n  what to do: near ties between tokens fall either way under other "
                "rounding, so try another prompt; pass tolerance=... to accept it, or verify_tokens=0 to look at it"
            )
        if not torch.equal(got.tokens[:, step], want.tokens[:, step].cpu()):
            break  # a tie: from here on the two go different ways, each rightly
    report.steps = count


def spec_json(wiring: Wiring, prefill: OptimizedModel, files: Mapping[str, str], **more: Any) -> str:
    """generate.json."""
    plan = json.loads(prefill.plan.json())
    spans = sorted({(cut.start, cut.start + cut.n * cut.unit) for stage in wiring.stages for cut in stage.cuts})
    data = {
        "format": FORMAT,
        **files,
        "next_position": wiring.length,
        "spans": spans,
        **{k: v for k, v in asdict(wiring).items() if k not in ("caches", "kept", "states")},
        "caches": [dict(zip(("layer", "from", "into", "out"), one)) for one in wiring.caches],
        "kept": [{"from": source, "into": into} for source, into in wiring.kept],
        "states": [dict(zip(("from", "into", "out"), one)) for one in wiring.states],
        "method": plan["method"],
        "budget": plan["budget"],
        "plan": plan,
        **more,
    }
    return json.dumps(data, indent=2)
