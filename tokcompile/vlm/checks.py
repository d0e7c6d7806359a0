"""Whether a vision-language model can be taken apart: its parts, put together, have to give what it gives itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError
from tokcompile.passes.faithful import TOLERANCE, worst
from tokcompile.vlm.masks import Span
from tokcompile.vlm.observe import Observed, begun, further_of
from tokcompile.vlm.prompt import Prompt

CLOSE = 1e-5  # of the largest embedding: how near the placed features must be to what the model gave its decoder


def check_seen(model: nn.Module, seen: Observed, spans: Sequence[Span]) -> None:
    """Raises: InputError where no features of the pixels stand at the placeholders."""
    pixels = seen.source.pixels
    if seen.owner is None and not changed(model, seen, spans, {pixels: seen.kwargs[pixels].flip(-2)}):  # other rows or patches
        given = ", ".join(name for name, value in seen.kwargs.items() if isinstance(value, Tensor))
        raise InputError(
            f"{type(model).__name__} did not call {seen.source.features} on these inputs ({given}), and no "
            f"{pixels} are in what its decoder begins with\n"
            f"  what to do: pass {pixels} and what belongs to them, such as image_grid_thw or image_sizes; a "
            "model whose features do not go into its prompt is optimized as a whole"
        )


def check_question(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> None:
    """Raises: InputError where features depend on the text: those of one question would be given for all."""
    where = seen.source.features if seen.owner is not None else type(model).__name__
    ids = inputs["input_ids"]
    if seen.owner is None:
        given = changed(model, seen, spans, {"input_ids": other_text(ids, spans)})
    else:
        given = any(value is ids for value in (*seen.args, *seen.kwargs.values()))
    if given:
        raise InputError(
            f"{where} is given input_ids too: this model looks at an image with the question in mind, so that its vision "
            "part would hold for the example's question alone\n  what to do: optimize the whole model, with use_cache=False, "
            "or its vision tower by itself"
        )


def check_hidden_inputs(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> None:
    """Raises: InputError where something is made of a question, or of another form of the image, before features are made of
    it: that of the example would be given for all."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    for name in further_of(tensors).keys() - {*seen.further, seen.source.pixels}:
        if changed(model, seen, spans, {**inputs, name: inputs[name].flip(-1)}):
            raise InputError(
                f"{name} changes the features of the image, and {seen.source.features} is not given it itself, but something "
                "made of it\n  what to do: optimize the whole model, with use_cache=False, or its vision tower by itself"
            )


def changed(model: nn.Module, seen: Observed, spans: Sequence[Span], inputs: Mapping[str, Any]) -> bool:
    """Whether the decoder begins with something else at the placeholders where these inputs take the place of the example's."""
    with torch.no_grad():
        embeds = begun(model, seen, {**(seen.kwargs if seen.owner is None else {}), **inputs})
    assert seen.embeds is not None
    return any(not torch.equal(embeds[:, start:stop], seen.embeds[:, start:stop]) for start, stop in spans)


def other_text(ids: Tensor, spans: Sequence[Span]) -> Tensor:
    """The same placeholders, and the tokens of the text one place further on."""
    image = {p for span in spans for p in range(*span)}
    text = torch.tensor([p for p in range(ids.shape[1]) if p not in image])
    return ids.index_copy(1, text, ids[:, text].roll(1, 1))


def off_by(seen: Observed, features: Mapping[str, Any], prompt: Prompt, table: Tensor) -> float:
    """How far features and embeddings put together are from what the model gave its own decoder."""
    assert seen.embeds is not None
    with torch.no_grad():
        placed = prompt.assemble(table, features, prompt.position_ids, None)["inputs_embeds"]
    return float((placed - seen.embeds).abs().max() / seen.embeds.abs().max())


def check_features(off: float) -> None:
    """Raises: InputError where that is more than rounding."""
    if not off <= CLOSE:
        raise InputError(
            f"features and embeddings put together are off by {off:.1e} from what the model gives its decoder: it does more "
            "between the two than replacing placeholders\n  what to do: optimize the whole model, with use_cache=False, or the "
            "parts of it one by one"
        )


def check_logits(seen: Observed, got: Tensor, prompt: Prompt) -> None:
    """Compares the last token's logits of the language part, (B, vocabulary), with the model's. Raises: InputError."""
    want = seen.logits
    if want is None:
        return
    there = prompt.mask[:, -1].bool()  # a row that ends in padding ends in another token
    off = worst([got[there]], [want[there]])
    if off > TOLERANCE.get(want.dtype, CLOSE):
        also = f", which is given {', '.join(seen.beside)} too" if seen.beside else ""
        raise InputError(
            f"the decoder gives other logits on embeddings, positions and masks alone, off by {off:.1e} from the model's "
            f"own{also}\n  what to do: nothing yet; optimize the vision part by itself, or the whole model"
        )


def check_further(wanted: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises: InputError where the vision part is not given what it takes beside the pixels."""
    for name in sorted(set(wanted) ^ set(given)):
        if name in wanted:
            raise InputError(f"the vision part takes {name} beside the pixels: pass it too, as {name}=")
        raise InputError(f"the vision part takes no {name} ({', '.join(['the pixels', *wanted])})")
