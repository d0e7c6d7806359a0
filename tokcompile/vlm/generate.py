"""Images and text in, text out, in PyTorch: the parts, a reduced prefill, and the decode step that goes on after it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tokcompile.api import OptimizedModel
from tokcompile.errors import InputError
from tokcompile.llm.generate import Generated
from tokcompile.llm.generate import Generator as TextGenerator
from tokcompile.recipe import methods
from tokcompile.vlm.split import Parts


class Generator:
    """A vision-language model after reductions in its vision part, in its prefill, or in both.

    parts: of the model; after a reduced vision part, `parts.after(vision)`. prefill: what
    `tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", ...)` gave. max_new_tokens: the most tokens
    that one call may generate.

    Raises: InputError, TraceError.

    Example:
        >>> generator = tokcompile.vlm.Generator(parts, prefill, max_new_tokens=64)                   # doctest: +SKIP
        >>> generator(pixel_values, input_ids).tokens                                                # doctest: +SKIP
    """

    def __init__(self, parts: Parts, prefill: OptimizedModel, *, max_new_tokens: int):
        self.parts = parts
        check_padding(parts, prefill)
        self.text = TextGenerator(prefill, parts.causal_model, max_new_tokens=max_new_tokens)

    def __call__(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Generated:
        """Generates. input_ids: (B, L), with the images where those of the example are. attention_mask: (B, L), where the
        parts take padding. options: what the vision part takes beside the pixels, and those of `tokcompile.llm.Generator`.
        Raises: InputError."""
        plan = self.text.prefill.plan
        self.parts.prompt.check_pivots(attention_mask, plan.method, plan.options)
        begin = time.perf_counter()
        further = {name: options.pop(name) for name in self.parts.further if name in options}
        with torch.no_grad():
            inputs = self.parts.language_inputs(input_ids, self.parts.see(pixel_values, **further), attention_mask)
        before = time.perf_counter() - begin
        made = self.text(next_position=self.parts.prompt.positions(attention_mask)[1], **flat(inputs), **options)
        made.seconds[0] += before  # the image is part of the time to the first token
        return made


def check_padding(parts: Parts, prefill: OptimizedModel) -> None:
    """Raises: InputError for a method that lets every token of the text rate the image, padding too."""
    recipe = methods().get(prefill.plan.method)
    if parts.padded and prefill.plan.reductions and recipe is not None and "text_attention" in recipe.taps:
        raise InputError(
            f"{recipe.name} reads all tokens of the text, and this language part takes padding, which would be among them\n"
            "  what to do: split without room= and padded=, for prompts of one length (--room exact); or choose another method"
        )


def flat(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the language part as its programs name them."""
    deep = {f"deepstack_{i}": value for i, value in enumerate(inputs.get("deepstack", ()))}
    return {name: value for name, value in inputs.items() if name != "deepstack"} | deep
