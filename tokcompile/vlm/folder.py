"""The files of a vision-language model, run in ONNX Runtime: image and text in, tokens out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokcompile.api import OptimizedModel
from tokcompile.errors import ExportError, InputError, PlanError
from tokcompile.llm.folder import SPEC, Session
from tokcompile.llm.folder import Folder as TextFolder
from tokcompile.llm.generate import Generated
from tokcompile.llm.tokenizer import encoded
from tokcompile.passes.plan import Plan
from tokcompile.passes.tokens import Run
from tokcompile.vlm.generate import flat
from tokcompile.vlm.image import Preprocess, pixel_values
from tokcompile.vlm.kept import seen_by
from tokcompile.vlm.observe import IMAGES
from tokcompile.vlm.parts import PIXELS, with_words
from tokcompile.vlm.prompt import Prompt

if TYPE_CHECKING:
    from tokcompile.vlm.split import Parts

KEY = "images"


def has_images(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of these, and not of a language model alone."""
    try:
        with open(os.path.join(folder, SPEC), encoding="utf-8") as file:
            return KEY in json.load(file)
    except (OSError, ValueError):
        return False


class Folder:
    """What `tokcompile.vlm.export` wrote, ready to generate in ONNX Runtime on the CPU. Called as a Generator is."""

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.text = TextFolder(folder, threads)
        self.path = self.text.path
        spec = os.path.join(self.path, SPEC)
        try:
            data = self.text.data[KEY]
            self.prompt = Prompt.from_data(data["prompt"])
            self.plan = Plan.from_json(json.dumps(data["plan"]))
            self.kept_of = {name: Run(*map(int, run)) for name, run in data["kept"].items()}
            self.shape = tuple(data["shape"])
            self.preprocess = [Preprocess.from_data(one) for one in data["preprocess"]]
            self.fixed = {name: torch.tensor(values) for name, values in data["fixed"].items()}
            self.pixels_name = data.get("pixels", IMAGES.pixels)
            self.further = {name: (tuple(s), getattr(torch, kind)) for name, (s, kind) in data.get("further", {}).items()}
            self.words = {int(i): torch.tensor(row) for i, row in data.get("words", {}).items()}
            self.template, self.before = data["template"], [int(i) for i in data["before"]]
            vision = os.path.join(self.path, data["vision"])
        except KeyError as error:
            raise ExportError(f"{spec} is damaged, or of a language model alone: {error} is missing") from error
        except (AttributeError, TypeError, ValueError, PlanError) as error:
            raise ExportError(f"{spec} is damaged: {type(error).__name__}: {error}") from error
        if not os.path.isfile(vision):
            raise ExportError(f"{vision} is missing: export the model again")
        self.vision = Session(vision, threads)

    @property
    def padded(self) -> bool:
        """Whether texts may be shorter than there is room for."""
        return "attention_mask" in self.text.wiring.inputs

    @property
    def tokenizer(self) -> Any:
        """Of tokenizer.json. Raises: InputError."""
        return self.text.tokenizer

    @property
    def count(self) -> int:
        """How many images there are in a prompt."""
        return len(self.prompt.full)

    def texts(self, prompt: str) -> list[list[int]]:
        """The token ids before, between and after the images for a text. Raises: InputError."""
        if self.template is not None:
            return [self.encode(piece) for piece in self.template.replace("{prompt}", prompt).split("{image}")]
        pieces = prompt.split("{image}")
        if len(pieces) == 1 == self.count:  # the example's own text stands before the image
            return [self.before, self.encode(prompt)]
        if len(pieces) - 1 != self.count:
            raise InputError(
                f"{self.path} was exported for {self.count} image(s) in a prompt, and this text has {{image}} "
                f"{len(pieces) - 1} time(s): write it where each of them stands"
            )
        return [self.encode(piece) for piece in pieces]

    def encode(self, text: str) -> list[int]:
        return encoded(self.tokenizer, text)

    def pixels(self, images: Sequence[str], stretch: bool = False) -> Tensor:
        """Pixel values from image files. stretch: whatever the shape of an image. Raises: InputError."""
        if not self.preprocess:
            raise InputError(
                f"{self.path} does not say how images are preprocessed: pass pixel values as a .npz or .npy file (--pixels), "
                "or export again with preprocess="
            )
        batch = self.text.wiring.batch
        if len(images) != self.count * batch:
            samples = f" of {batch} samples, {self.count} in each" if batch > 1 else ""
            raise InputError(
                f"{self.path} was exported for {self.count * batch} image(s){samples}, and {len(images)} are given: pass "
                "--image for each"
            )
        return pixel_values(self.preprocess, images, self.shape, stretch)

    def array(self, path: str) -> Tensor:
        """Pixel values that are ready, from a .npy file, or a .npz file of all that a processor gave, whose layout is checked.

        Raises: InputError.
        """
        return self.arrays(path)[PIXELS]

    def arrays(self, path: str) -> dict[str, Tensor]:
        """The same with what the vision part takes beside them, by name. Raises: InputError."""
        try:
            loaded = np.load(path, allow_pickle=False)
            given = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {self.pixels_name: loaded}
            pixels = torch.from_numpy(np.ascontiguousarray(given[self.pixels_name], dtype=np.float32))
            further = {name: torch.from_numpy(given[name]).to(kind) for name, (_, kind) in self.further.items()}
        except KeyError as error:
            raise InputError(f"{path} holds no {error.args[0]} (it holds {', '.join(given) or 'nothing'})") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the pixel values {path!r}: {error}") from error
        if hasattr(loaded, "files"):
            self.check_layout({name: torch.from_numpy(value) for name, value in given.items()}, path)
        return {PIXELS: pixels, **further}

    def check_layout(self, given: Mapping[str, Tensor], path: str) -> None:
        """Raises: InputError where the images lie otherwise than in the example, though their values may be as many."""
        for name, want in self.fixed.items():
            if name not in given:
                raise InputError(f"{path} lacks {name}, which says how the images lie: save all that the processor gives")
            if given[name].tolist() != want.tolist():
                raise InputError(
                    f"{name} is {given[name].tolist()}, and {self.path} was made for {want.tolist()}\n  what to do: export a "
                    "folder for each layout of images"
                )
        if "input_ids" not in given or self.template is None:
            return
        pieces = self.template.split("{image}")
        for i, text in enumerate(self.prompt.texts_of(given["input_ids"][0].tolist())):
            if 0 < i < len(pieces) - 1 and "{prompt}" not in pieces[i] and self.encode(pieces[i]) != text:
                raise InputError(
                    f"the text between images {i} and {i + 1} of {path} is not that of the example ({pieces[i]!r}): the tiles "
                    "of an image lie otherwise\n  what to do: export a folder for each layout of images"
                )

    def lay_out(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of a prompt, the same in each row of the batch. Raises: InputError."""
        ids, mask = self.prompt.lay_out(texts, self.padded)
        return ids.repeat(self.text.wiring.batch, 1), mask.repeat(self.text.wiring.batch, 1)

    def __call__(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Generated:
        """Generates; see `Generator`. Raises: InputError."""
        further = {name: options.pop(name) for name in self.further if name in options}
        self.check_further(further)
        self.prompt.check_pivots(attention_mask, self.text.data["method"], self.text.data["plan"]["options"])
        begin = time.perf_counter()
        made = self.vision({PIXELS: self.cast(pixel_values), **further})
        deep = [made[f"deepstack_{i}"] for i in range(sum(name.startswith("deepstack_") for name in made))]
        outputs: dict[str, Any] = {"features": made["features"]} | ({"deepstack": deep} if deep else {})
        indices = {name: value for name, value in made.items() if name.endswith("_index")}
        seen = seen_by(self.prompt, outputs, indices, self.kept_of)
        ids = input_ids if "input_ids" in self.text.wiring.inputs else None
        inputs = flat(self.prompt.inputs(self.embed(input_ids), seen, attention_mask, self.padded, ids))
        dtypes = {name: getattr(torch, dtype) for name, (_, dtype) in self.text.wiring.inputs.items()}
        inputs = {name: value.to(dtypes[name]) for name, value in inputs.items()}
        before = time.perf_counter() - begin
        result = self.text(next_position=self.prompt.positions(attention_mask)[1], **inputs, **options)
        result.seconds[0] += before
        return result

    def check_further(self, given: Mapping[str, Tensor]) -> None:
        """Raises: InputError where what the vision part takes beside the pixels is missing, or has another form."""
        for name, (shape, kind) in self.further.items():
            if name not in given:
                raise InputError(
                    f"the vision part takes {name} beside the pixels: pass all that the processor gives, as a .npz file "
                    f"(--pixels), or {name}="
                )
            if tuple(given[name].shape) != shape or given[name].dtype != kind:
                raise InputError(
                    f"{name} is {tuple(given[name].shape)} of {given[name].dtype}, and the vision part takes {shape} of {kind}"
                )

    def cast(self, pixels: Tensor) -> Tensor:
        """To the type that the file takes, checked. Raises: InputError."""
        if tuple(pixels.shape) != self.shape:
            raise InputError(
                f"pixel_values are {'x'.join(map(str, pixels.shape))}, and the vision part takes "
                f"{'x'.join(map(str, self.shape))}"
            )
        kinds = {"tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
        return pixels.to(kinds.get(self.vision.session.get_inputs()[0].type, torch.float32))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L, D); a placeholder's row is replaced later. Raises: InputError."""
        ids = self.prompt.check(input_ids)
        ids = ids.masked_fill(ids == self.prompt.image_token, 0)
        wrong = ids[(ids < 0) | (ids >= len(self.text.embeddings))]
        if len(wrong):
            raise InputError(f"the id {int(wrong[0])} is not among the {len(self.text.embeddings)} of the vocabulary")
        return with_words(torch.from_numpy(self.text.embeddings[ids.numpy()]), ids, self.words)


def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> Folder:
    """Loads what `tokcompile.vlm.export` wrote. Raises: ExportError."""
    return Folder(folder, threads)


def spec(
    parts: Parts, vision: OptimizedModel, files: Mapping[str, str], preprocess: Sequence[Preprocess], template: str | None
) -> dict[str, Any]:
    """The part of generate.json that is about images."""
    prompt, seen, (pixels,) = parts.prompt, parts.seen, parts.vision.args
    example = zip(parts.embeddings.kwargs["input_ids"][0], prompt.mask[0])
    further = {n: [list(v.shape), str(v.dtype).removeprefix("torch.")] for n, v in parts.vision.kwargs.items()}
    return {
        "vision": files["vision"],
        "shape": list(pixels.shape),
        "preprocess": [one.data() for one in preprocess],
        "features": {"from": "features", "into": "inputs_embeds", "at": list(prompt.spans)},
        "prompt": prompt.data(),
        "template": template,
        "before": [int(i) for i, real in islice(example, prompt.full[0][0]) if real],
        "pixels": seen.source.pixels,
        "fixed": {name: value.tolist() for name, value in seen.fixed.items()},
        "further": further,
        "words": {str(word): row.tolist() for word, row in parts.words.items()},
        "plan": json.loads(vision.plan.json()),
        "kept": dict(vision.kept_of),
    }
