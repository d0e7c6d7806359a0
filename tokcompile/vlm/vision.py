"""The reduced vision part of a vision-language model alone, as a file for a runtime that has a decoder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokcompile.api import OptimizedModel, ReducedOutput
from tokcompile.errors import InputError
from tokcompile.exports.names import output_names
from tokcompile.exports.onnx import ExportReport
from tokcompile.files import atomic
from tokcompile.passes.graph import Builder, aten, device_of, fake_mode, shape
from tokcompile.passes.rewrite import shallow_copy
from tokcompile.passes.tokens import Run
from tokcompile.vlm.kept import chosen_of, flat
from tokcompile.vlm.prompt import Prompt
from tokcompile.vlm.split import Parts

FORMAT = 1


def export_vision(parts: Parts, path: str | os.PathLike[str], **options: Any) -> ExportReport:
    """Writes a reduced vision part to an ONNX file that also gives which placeholders its features stand for, and their
    positions; beside it, as .json, what else a runtime with a decoder of its own has to know.

    parts: what `parts.after(vision)` gave. options: of `tokcompile.exports.onnx.export_onnx`. Outputs, for K features of a
    sample: features (rows, k, width), K in all; deepstack_0 .. (B, K, width), at the same tokens; kept (B, K), among the
    placeholders of all images of the sample, in the order of the features; positions (B, K), or (axes, B, K), counted from
    where the positions of their image begin.

    Raises: InputError, ExportError.

    Example:
        >>> parts = parts.after(tokcompile.optimize(*parts.vision, outputs="reduced"))               # doctest: +SKIP
        >>> tokcompile.vlm.export_vision(parts, "vision.onnx")                                       # doctest: +SKIP
    """
    if options.get("dynamic_batch"):
        raise InputError("dynamic_batch=True: which placeholders features stand for is known for the example's batch alone")
    made = with_places(parts)
    report = made.export_onnx(path, **options)
    with atomic(os.path.splitext(os.fspath(path))[0] + ".json") as temporary, open(temporary, "w", encoding="utf-8") as file:
        files = {form: os.path.basename(name) for form, name in report.files.items()}
        file.write(json.dumps({"format": FORMAT, "files": files, **data_of(parts, made)}, indent=2) + "\n")
    return report


def data_of(parts: Parts, vision: OptimizedModel) -> dict[str, Any]:
    """What is written beside the file. step: how far the text goes on after an image, counted from where it begins."""
    prompt = parts.prompt
    assert prompt.rule is not None
    left = [last - first for first, last in prompt.spans]
    steps = left if prompt.renumber else prompt.rule.steps
    return {
        "image_token": prompt.image_token,
        "images": [dict(placeholders=n, left=k, step=s) for n, k, s in zip(prompt.images, left, steps)],
        "axes": len(prompt.rule.offsets[0]),
        "deepstack_after": list(parts.seen.after),
        "fixed": {name: value.tolist() for name, value in parts.seen.fixed.items()},
        "plan": json.loads(vision.plan.json()),
    }


def with_places(parts: Parts) -> OptimizedModel:
    """The reduced vision part with two more outputs, kept and positions. Raises: InputError."""
    optimized, prompt = parts.optimized, parts.prompt
    if optimized is None or optimized.plan.outputs != "reduced" or prompt.length == prompt.full_length:
        raise InputError(
            "the vision part gives all features: there is nothing to say about where they stand\n"
            '  what to do: parts.after(tokcompile.optimize(*parts.vision, outputs="reduced")), with a budget below 1'
        )
    if prompt.rule is None:
        raise InputError(
            "the positions of the example follow no rule that is known, so that those of an image in another prompt are not "
            "known either\n  what to do: optimized.export_onnx(...), and parts.position_ids for a prompt like the example"
        )
    with torch.no_grad():
        out = optimized(*parts.vision.args, **parts.vision.kwargs)
    assert isinstance(out, ReducedOutput)
    places = Places(prompt, out.kept, optimized.kept_of)
    return appended(optimized, lambda b, outputs: places.written(b, outputs, out.output))


class Places:
    """indices: what the part gave in the example. runs: what each is an index of."""

    def __init__(self, prompt: Prompt, indices: Mapping[str, Tensor], runs: Mapping[str, Run]):
        self.prompt, self.indices, self.runs = prompt, indices, runs
        self.batch, self.total = prompt.position_ids.shape[-2], sum(prompt.images)

    def written(self, b: Builder, outputs: Mapping[str, Node], made: Mapping[str, Any]) -> dict[str, Node]:
        """Outputs that are new or other than before. made: the example's. Raises: InputError."""
        kept, order = self.kept(b, outputs, made["features"]), None
        assert kept is not None
        if self.prompt.in_order:
            kept, order = b.unpack(b.emit(aten.sort.default, kept, 1))
        new = {"kept": kept, "positions": self.positions(b, kept)}
        for i, deep in enumerate((made["features"], *made.get("deepstack", ()))):
            name = f"deepstack_{i - 1}" if i else "features"
            value = b.emit(aten.reshape.default, outputs[name], [self.batch, -1, shape(outputs[name])[-1]])
            if shape(value)[1] != shape(kept)[1]:  # taken at an earlier layer, of more tokens
                new[name] = self.taken(b, value, self.among(b, kept, self.kept(b, outputs, deep)))
            elif order is not None:
                new[name] = self.taken(b, value, order)
            elif i:
                new[name] = value
        return new

    def kept(self, b: Builder, outputs: Mapping[str, Node], features: Tensor) -> Node | None:
        """(B, K) among the placeholders of a sample; None where all are there. Raises: InputError."""
        found = chosen_of(self.prompt, flat(features, self.batch), self.indices, self.runs)
        if found is None:
            return None
        runs = [(outputs[name], self.runs[name]) for name in found[0]]
        rows, each = shape(runs[0][0])[0], sum(sum(run) for _, run in runs)
        pieces, begin = [], 0
        for index, (before, n, after) in runs:
            starts = (torch.arange(rows) * each + begin) % self.total
            begin += before + n + after
            if int(starts.max()) + before + n + after > self.total:
                raise InputError(
                    "one reduction is over the tokens of several samples, so that how many each keeps is not fixed\n"
                    "  what to do: split and export with one sample"
                )
            plain = torch.arange(before + n + after) + starts[:, None]
            pieces += [b.constant(plain[:, :before].contiguous(), "before")] * (before > 0)
            pieces.append(b.emit(aten.add.Tensor, index, b.constant(starts[:, None] + before, "starts")))
            pieces += [b.constant(plain[:, before + n :].contiguous(), "after")] * (after > 0)
        whole = b.emit(aten.cat.default, pieces, 1) if len(pieces) > 1 else pieces[0]
        return b.emit(aten.reshape.default, whole, [self.batch, -1])

    def positions(self, b: Builder, kept: Node) -> Node:
        """(B, K) or (axes, B, K), from where their image's begin; without gaps they are the same for each image."""
        assert self.prompt.rule is not None
        if self.prompt.renumber:
            left = [torch.arange(last - first) for first, last in self.prompt.spans]
            return b.constant(torch.cat(left).expand(self.batch, -1).contiguous(), "positions")
        table = b.constant(torch.cat(self.prompt.rule.offsets, 1), "offsets")
        found = b.emit(aten.index_select.default, table, 1, b.emit(aten.reshape.default, kept, [-1]))
        axes = [shape(table)[0]] if self.prompt.rule.several else []
        return b.emit(aten.reshape.default, found, [*axes, *shape(kept)])

    def among(self, b: Builder, kept: Node, there: Node | None) -> Node:
        """Where the tokens that are left stand among those that were left earlier, (B, K); None for all of them."""
        if there is None:
            return kept
        same = b.emit(aten.eq.Tensor, *(b.emit(aten.unsqueeze.default, v, d) for v, d in ((kept, 2), (there, 1))))
        return b.emit(aten.argmax.default, b.emit(aten.to.dtype, same, torch.float32), -1)

    def taken(self, b: Builder, value: Node, rows: Node) -> Node:
        """Some rows of (B, n, D)."""
        wide = b.emit(aten.expand.default, b.emit(aten.unsqueeze.default, rows, 2), [*shape(rows), shape(value)[-1]])
        return b.emit(aten.gather.default, value, 1, wide)


def appended(opt: OptimizedModel, more: Callable[[Builder, Mapping[str, Node]], Mapping[str, Node]]) -> OptimizedModel:
    """The same program with outputs that are computed from its own; those of a name that it has take its place."""
    gm, names = opt.graph_module, [*output_names(opt), *opt.extra_outputs]
    builder = Builder(shallow_copy(gm), fake_mode(gm.graph), device_of(gm.graph))
    builder.graph = Graph()
    values: Sequence[Any] = builder.graph.graph_copy(gm.graph, {})
    outputs = dict(zip(names, values, strict=True))
    made = more(builder, outputs)
    extra = [name for name in made if name not in outputs]
    outputs |= made
    builder.graph.output(tuple(outputs.values())).meta = {}
    other = opt.over(GraphModule(builder.root, builder.graph))
    other.extra_outputs, other.output_names = [*opt.extra_outputs, *extra], [*opt.output_names, *extra]
    return other
