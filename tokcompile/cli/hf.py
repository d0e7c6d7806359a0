"""A vision-language model from a local transformers folder, with the example call that its own processor makes of images and
a text, and what of the folder goes into the files beside the graphs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import InputError, first_line
from tokcompile.llm.tokenizer import TOKENIZER, encoded, read_tokenizer
from tokcompile.models import folder_of, require
from tokcompile.vlm import Parts, Preprocess
from tokcompile.vlm.export import preprocesses
from tokcompile.vlm.image import opened, pixel_values
from tokcompile.vlm.observe import source_of

DTYPES = {"float32": torch.float32, "float16": torch.float16}  # those that onnxruntime computes in on a CPU
SAME = 1e-3  # what rounding alone makes of it
NEAR = 0.05  # mean distance of normalised pixel values: what two ways to resample differ by is less, another crop is more
FITS = ("crop", "pad", "stretch")


@dataclass
class Example:
    """A model, an example call of it, and the text of that call with {image} and {prompt} in it."""

    folder: str
    model: Any
    inputs: dict[str, Any]
    processor: Any
    images: Sequence[str]
    prompt: str
    text: str  # as it is given to the processor, with {image} and {prompt} in it
    marker: str  # what stands for an image there

    @property
    def tokenizer(self) -> str:
        return os.path.join(self.folder, TOKENIZER)

    def template(self, parts: Parts) -> str | None:
        """A text with {image} and {prompt} that gives the example's ids again, piece by piece; None where the whole text is the
        prompt. Raises: InputError where there is none."""
        reader = read_tokenizer(self.folder)
        want = parts.prompt.texts_of(self.inputs["input_ids"][0].tolist())
        for text in self.candidates(parts, reader):
            if [encoded(reader, piece) for piece in text.replace("{prompt}", self.prompt).split("{image}")] == want:
                return text if "{prompt}" in text else None
        raise InputError(
            f"no text around the images was found from which {self.tokenizer} makes the ids that the processor makes\n"
            "  what to do: give the words alone to --prompt, for the folder's chat template; or pass --template with {image} "
            "and {prompt} in it, and all special tokens written out"
        )

    def candidates(self, parts: Parts, reader: Any) -> Iterable[str]:
        """The text as the processor gets it, and as it makes it: some write special tokens around each image."""
        text = self.text.replace(self.marker, "{image}")
        yield text
        yield f"{getattr(self.processor.tokenizer, 'bos_token', None) or ''}{text}"
        if "{prompt}" not in text:
            return
        for words in (self.prompt, "{prompt}"):  # a tokenizer need not know braces, and a short prompt may be there twice
            ids = call(self.processor, self.folder, self.images, self.text.replace("{prompt}", words))["input_ids"][0].tolist()
            made = "{image}".join(reader.decode(p, skip_special_tokens=False) for p in parts.prompt.texts_of(ids))
            if made.count(words) == 1:
                yield made.replace(words, "{prompt}")

    def preprocess(self, parts: Parts) -> list[Preprocess]:
        """How files become pixel values: the way that gives what the processor gives, or none where no way is known."""
        try:
            made = preprocesses(self.processor.image_processor.to_dict(), parts)
            patches = made[0].patches is not None  # of the size nearest to the image's own shape: that is what they stretch to
            for fit in [made[0].fit] if patches else dict.fromkeys([made[0].fit, *FITS]):
                how = [replace(one, fit=fit) for one in made]
                if self.distance(how) <= NEAR:
                    return how
        except InputError:
            return []
        return []

    def distance(self, how: Sequence[Preprocess]) -> float:
        """The mean distance between the pixel values of the processor and those made in that way, both normalised."""
        want = self.inputs[source_of(self.inputs).pixels].float()
        return float((pixel_values(how, self.images, want.shape, how[0].patches is not None) - want).abs().mean())


def load(
    folder: str, images: Sequence[str], prompt: str | None, template: str | None = None, dtype: str = "float32"
) -> Example:
    """The model of a folder in eval mode, and the inputs that its AutoProcessor makes of the image files and the text.

    prompt: the words of a user, which the folder's chat template or `template` puts in place, or the whole text with {image}
    in it once for each image.

    Raises: InputError that says what is missing.
    """
    if not images or prompt is None:
        raise InputError(
            f"hf:{folder} needs an example call: pass --image FILE, once for each image of a prompt, and --prompt TEXT"
        )
    check_folder(folder)
    transformers = require("transformers", f"hf:{folder}")
    processor = processor_of(transformers, folder)
    marker = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if not isinstance(marker, str):
        raise InputError(f"the processor of {folder}, a {type(processor).__name__}, names no image_token: it reads no images")
    text = text_of(processor, folder, len(images), prompt, template, marker)
    inputs = call(processor, folder, images, text.replace("{prompt}", prompt))
    model = model_of(transformers, folder, DTYPES[dtype])
    return Example(folder, model, as_inputs(inputs, DTYPES[dtype]), processor, images, prompt, text, marker)


def check_folder(folder: str) -> None:
    """Raises: InputError."""
    path = folder_of(folder)
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise InputError(
            f"{folder} holds no processor (processor_config.json or preprocessor_config.json), which makes pixel values and "
            "ids of images and text\n  what to do: copy the model's there, or AutoProcessor.from_pretrained(...)"
            f".save_pretrained({folder!r})"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise InputError(
            f"{folder} holds no weights (*.safetensors or *.bin)\n  what to do: download them into it; for random weights "
            "write a function that returns (model, (), inputs) and name it as package.module:function"
        )
    if not (path / TOKENIZER).is_file():
        raise InputError(
            f"{folder} holds no {TOKENIZER}\n  what to do: copy the model's there, or AutoTokenizer.from_pretrained(...)"
            f".save_pretrained({folder!r})"
        )


def processor_of(transformers: Any, folder: str) -> Any:
    """Raises: InputError."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of every kind: a processor's own code runs here
        raise InputError(f"transformers cannot load the processor of {folder}: {first_line(error)}") from error
    lacks = [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]
    if lacks:
        raise InputError(f"the processor of {folder}, a {type(processor).__name__}, has no {' and no '.join(lacks)}")
    return processor


def model_of(transformers: Any, folder: str, dtype: torch.dtype) -> Any:
    """Raises: InputError."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"transformers cannot load {folder} as a vision-language model: {first_line(error)}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise InputError(f"the weights in {folder} lack {len(missing)} of the model's, such as {missing[0]}")
    return model.eval()


def text_of(processor: Any, folder: str, count: int, prompt: str, template: str | None, marker: str) -> str:
    """The text of an example for the processor, with {prompt} in it unless the prompt is the whole text. Raises: InputError."""
    if template is not None:
        text = template.replace("{image}", marker)
        if text.count(marker) != count or text.count("{prompt}") != 1:
            raise InputError(f"--template {template!r} has to hold {{prompt}} once, and {{image}} {count} time(s)")
        return text
    whole = prompt.replace("{image}", marker)
    if marker in whole:
        if whole.count(marker) != count:
            raise InputError(f"the prompt has {whole.count(marker)} image placeholder(s), and {count} image(s) are given")
        return whole
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"there is no image placeholder in the prompt, and {folder} has no chat template that would write one\n"
            "  what to do: write {image} into --prompt where the image stands; or pass --template with {image} and {prompt} in "
            f'it, such as --template "{"{image} " * count}{{prompt}}"'
        )
    content = [*[{"type": "image"}] * count, {"type": "text", "text": "{prompt}"}]
    try:
        text = str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    except Exception as error:
        raise InputError(f"the chat template of {folder} fails: {first_line(error)}\n  what to do: pass --template") from error
    if text.count(marker) != count or text.count("{prompt}") != 1:
        raise InputError(
            f"the chat template of {folder} gives {text!r}, without {count} of {marker} and the prompt\n"
            "  what to do: pass --template with {image} and {prompt} in it"
        )
    return text


def call(processor: Any, folder: str, images: Sequence[str], text: str) -> Mapping[str, Any]:
    """What the processor makes of image files and a text. Raises: InputError."""
    pictures = [opened(path) for path in images]
    bos = getattr(processor.tokenizer, "bos_token", None)
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}  # a chat template writes its own
    try:
        made: Mapping[str, Any] = processor(images=pictures, text=[text], return_tensors="pt", **options)
    except Exception as error:
        raise InputError(f"the processor of {folder} does not take these images and this text: {first_line(error)}") from error
    return made


def as_inputs(made: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """An example call: tensors, floats of the model's type."""
    tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()} | {"use_cache": False}
