"""`opt.export_onnx(folder)`: a whole vision-language model that `optimize` reduced, as the files that generate.

The model is taken apart, and each reduction of its plan is made again in the part that holds its block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tokcompile.api import OptimizedModel, ReducedOutput
from tokcompile.compiler import analyse, compile_plan, named, settings_for
from tokcompile.errors import ExportError
from tokcompile.llm.export import FolderReport
from tokcompile.passes.faithful import worst
from tokcompile.passes.plan import Reduction
from tokcompile.vlm.checks import CLOSE
from tokcompile.vlm.example import image_spans, image_token_of
from tokcompile.vlm.export import check_text, export
from tokcompile.vlm.masks import Span
from tokcompile.vlm.observe import source_of
from tokcompile.vlm.split import Part, Parts, split

BY_PARTS = "\n  what to do: optimize the parts of tokcompile.vlm.split one by one, and write them with tokcompile.vlm.export"


def export_whole(
    opt: OptimizedModel,
    folder: str | os.PathLike[str],
    *,
    max_new_tokens: int = 128,
    room: Sequence[int] | None = None,
    **options: Any,
) -> FolderReport:
    """Writes vision.onnx, prefill.onnx, decode.onnx, the embeddings and generate.json of a whole model into a new folder.

    opt: what `tokcompile.optimize(model, kwargs=inputs, ...)` gave, where inputs are a call with pixels and ids. room: as of
    `tokcompile.vlm.split`. max_new_tokens, options: as of `tokcompile.vlm.export`.

    Raises: InputError, UnsupportedGraph, ExportError; nothing is left behind then.

    Example:
        >>> fast = tokcompile.optimize(model, kwargs=inputs, method="dart", budget=tokcompile.Tokens(64))  # doctest: +SKIP
        >>> fast.export_onnx("folder", tokenizer="tokenizer.json")                                         # doctest: +SKIP
    """
    assert opt.original is not None
    model, inputs = opt.original
    images = image_spans(inputs["input_ids"], image_token_of(model, None, source_of(inputs)))
    check_text(len(images), options.get("tokenizer"), options.get("template"))
    parts = split(model, inputs, room=room)
    decoder = f"{parts.seen.language}."
    tower = [r for r in opt.plan.reductions if not r.path.startswith(decoder)]
    # what the tower leaves is numbered anew only where that was asked for
    anew = any(r.options.get("renumber") for r in named(opt.plan) if not r.path.startswith(decoder))
    if tower:
        parts = parts.after(again(opt, parts.vision, tower), renumber=anew)
    inside = [r for r in opt.plan.reductions if r.path.startswith(decoder)]
    seen = parts.see(*parts.vision.args, **parts.vision.kwargs)
    inside = placed(inside, parts, seen, images, inputs["input_ids"].shape[1])
    inside = [replace(r, path=r.path.removeprefix(f"{parts.causal}.")) for r in inside]
    prefill = again(opt, parts.language, inside, parts.spans)
    if tower and opt.renumbered and not prefill.renumbered and not anew:
        raise ExportError(
            f"{inside[0].method or opt.plan.method!r} numbers tokens anew in the language model; in its part of this model the "
            "positions that the reduced tower left already have gaps, and are read as they are\n"
            "  what to do: optimize the language model with renumber=False, which keeps positions as they are"
        )
    check_same(opt, parts, prefill, seen)
    return export(parts, prefill, folder, max_new_tokens=max_new_tokens, **options)


def placed(
    reductions: Sequence[Reduction], parts: Parts, seen: Mapping[str, Any], images: Sequence[Span], length: int
) -> list[Reduction]:
    """The same in the prompt of the parts, with room for more text and with what a reduced tower left of the images.

    seen: what the vision part gives. images: their spans among the `length` tokens of the whole prompt."""
    kept = seen["kept"][0] if "kept" in seen else torch.arange(sum(parts.prompt.images))  # each sample has as many of a run
    out = []
    for r in reductions:
        image = next(i for i, (start, stop) in enumerate(images) if start <= r.prefix < stop)
        text = parts.prompt.full[image][0] - sum(parts.prompt.images[:image])
        before = (sum(min(max(at - a, 0), b - a) for a, b in images) for at in (r.prefix, length - r.suffix))
        start, stop = (text + int((kept < count).sum()) for count in before)
        out.append(replace(r, prefix=start, suffix=parts.prompt.length - stop))
    return out


def again(
    opt: OptimizedModel, part: Part, reductions: Sequence[Reduction], spans: Sequence[Span] | None = None
) -> OptimizedModel:
    """A part with these reductions, in its blocks of the same paths. spans: of the language part. Raises: ExportError."""
    analysis = analyse(*part)
    left: dict[str, list[int]] = {}
    for block in analysis.structure.blocks:
        left.setdefault(block.path, []).append(block.index)
    numbers: dict[int, int] = {}
    for r in reductions:  # a tower that is called for each of several images has blocks of one path
        if r.block not in numbers:
            path = next((p for p in left if left[p] and (p == r.path or p.endswith(f".{r.path}"))), None)
            if path is None:
                raise ExportError(f"the block {r.path} of the whole model is in none of its parts{BY_PARTS}")
            numbers[r.block] = left[path].pop(0)
    plan = opt.plan.replace(reductions=tuple(replace(r, block=numbers[r.block]) for r in reductions), outputs="reduced")
    settings = settings_for(
        opt.recipes.get(plan.method, plan.method), plan.options, outputs=plan.outputs, recover=plan.recover, spans=spans,
        **opt.spec,
    )  # fmt: skip
    settings.recipes = opt.recipes
    return OptimizedModel(compile_plan(analysis, settings, None, None, plan), opt.spec, opt.recipes)


def check_same(opt: OptimizedModel, parts: Parts, prefill: OptimizedModel, seen: Mapping[str, Any]) -> None:
    """Raises: ExportError where the parts do not give the last logits of the model that was optimized as a whole.

    seen: what the vision part gives."""
    args, kwargs = opt.example_call
    ids, mask = parts.embeddings.kwargs["input_ids"], parts.prompt.mask if parts.padded else None
    with torch.no_grad():
        whole = opt(*args, **kwargs)
        made = prefill(**parts.language_inputs(ids, seen, mask))
    whole, made = (one.output if isinstance(one, ReducedOutput) else one for one in (whole, made))
    off = worst([made["logits"][:, -1]], [whole["logits"][:, -1]])
    if off > 10 * CLOSE:
        raise ExportError(f"the parts of this model give other logits than the whole one, off by {off:.1e}{BY_PARTS}")
