"""A vision-language model as files: vision.onnx, prefill.onnx, decode.onnx, embeddings.npy, and generate.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tokcompile.api import OptimizedModel
from tokcompile.errors import InputError
from tokcompile.files import atomic_folder
from tokcompile.llm.decode import folded, untouched
from tokcompile.llm.export import (
    FolderReport,
    check_runs,
    check_tokenizer,
    finish,
    limit_of,
    spec_json,
    verify,
    write_embeddings,
    write_graphs,
)
from tokcompile.llm.folder import SPEC
from tokcompile.llm.tokenizer import TOKENIZER
from tokcompile.passes.trace import trace
from tokcompile.vlm.folder import KEY, load, spec
from tokcompile.vlm.generate import Generator
from tokcompile.vlm.image import Preprocess
from tokcompile.vlm.parts import PIXELS
from tokcompile.vlm.split import Parts


def export(
    parts: Parts,
    prefill: OptimizedModel,
    folder: str | os.PathLike[str],
    *,
    max_new_tokens: int,
    preprocess: Preprocess | Sequence[Preprocess] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    template: str | None = None,
    overwrite: bool = False,
    verify_tokens: int = 4,
    tolerance: float | None = None,
    **options: Any,
) -> FolderReport:
    """Writes all that `tokcompile generate` needs into a new folder, and generates from it before it gets its name.

    parts, prefill, max_new_tokens: as of `tokcompile.vlm.Generator`. preprocess: how image files become pixel values, one for
    all or one for each image of a prompt, or what the model's preprocessor_config.json holds. tokenizer: the
    model's tokenizer.json. template: the whole text of a prompt, with {image} and {prompt} in it; without one, the text
    before the example's image stands before the image, and the prompt after it. options: of
    `tokcompile.exports.onnx.export_onnx`, for all graphs.

    Raises: InputError, TraceError, ExportError; nothing is left behind then.
    """
    how = preprocesses(preprocess, parts)
    check_text(len(parts.prompt.full), tokenizer, template)
    made = Generator(parts, prefill, max_new_tokens=max_new_tokens)
    pixels = parts.vision.args[0]
    check_runs(made.text, options, verify_tokens)
    further = parts.vision.kwargs
    vision = parts.optimized or untouched(folded(trace(parts.vision.module, kwargs={PIXELS: pixels, **further})))
    report = FolderReport(os.fspath(folder))
    with atomic_folder(folder, overwrite) as inside:
        graphs = {"vision": vision, "prefill": prefill, "decode": made.text.decode}
        write_graphs(graphs, inside, report, options)
        write_embeddings(parts.model, os.path.join(inside, report.files["embeddings"]))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, os.path.join(inside, TOKENIZER))
        images = spec(parts, vision, report.files, how, template)
        files = {name: file for name, file in report.files.items() if name != "vision"}
        with open(os.path.join(inside, SPEC), "w", encoding="utf-8") as file:
            file.write(spec_json(made.text.wiring, prefill, files, **{KEY: images}) + "\n")
        if verify_tokens:
            count = min(verify_tokens, max_new_tokens)
            limit = limit_of(tolerance, made.text, options)
            given = pixels, parts.embeddings.kwargs["input_ids"], parts.prompt.mask
            ours, theirs = (partial(run, *given, **further) for run in (made, load(inside)))
            verify(ours, theirs, count, limit, report)
        finish(report, inside, made.text.wiring)
    return report


def preprocesses(given: Preprocess | Sequence[Preprocess] | Mapping[str, Any] | None, parts: Parts) -> list[Preprocess]:
    """One for all images, or one for each of a prompt; none where nothing is said. Raises: InputError."""
    if isinstance(given, Preprocess):
        return [given]
    if not isinstance(given, Mapping):
        made = list(given or ())
        if len(made) > 1 and len(made) != len(parts.prompt.full):
            raise InputError(f"preprocess has {len(made)} entries, and a prompt {len(parts.prompt.full)} image(s)")
        return made
    pixels = parts.vision.args[0]
    grids: Sequence[Sequence[int] | None] = parts.grids or [None]
    made = [Preprocess.from_config(given, pixels.shape, grid) for grid in grids]
    return made if len(set(made)) > 1 else made[:1]


def check_text(images: int, tokenizer: str | os.PathLike[str] | None, template: str | None) -> None:
    """images: how many there are in a prompt. Raises: InputError, ExportError."""
    check_tokenizer(tokenizer)
    if template is not None and (template.count("{image}") != images or template.count("{prompt}") != 1):
        raise InputError(f"the template {template!r} has to hold {{prompt}} once, and {{image}} {images} time(s)")
