"""An example call of a vision-language model: its ids, pixels, padding, positions, and where its images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import InputError
from tokcompile.llm.caches import config_of
from tokcompile.passes.placeholders import runs
from tokcompile.vlm.masks import Span, check_spans
from tokcompile.vlm.observe import Observed, Source, source_of


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input_ids, pixel values, attention_mask or None). Raises: InputError."""
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    seen = source_of(inputs).pixels
    ids, pixels, mask = (inputs.get(name) for name in ("input_ids", seen, "attention_mask"))
    for name, value, dims in (("input_ids", ids, "(batch, length)"), (seen, pixels, "of the images of one call")):
        if not isinstance(value, Tensor):
            raise InputError(
                f"the example inputs have no {name} ({', '.join(inputs) or 'they are empty'}): pass {name} {dims}, as a tensor"
            )
    assert isinstance(ids, Tensor)
    assert isinstance(pixels, Tensor)
    if ids.ndim != 2:
        raise InputError(f"input_ids have the shape {tuple(ids.shape)}, and not (batch, length)")
    if mask is not None and tuple(mask.shape) != tuple(ids.shape):
        raise InputError(f"attention_mask has the shape {tuple(mask.shape)}, and input_ids {tuple(ids.shape)}")
    return ids, pixels, mask


def image_token_of(model: Any, given: int | None, source: Source) -> int:
    """The id of the placeholders. Raises: InputError."""
    if given is not None:
        return given
    whole = getattr(model, "config", None)
    for config in (whole, config_of(model), getattr(whole, "vision_config", None)):
        for name in source.tokens:
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    raise InputError(f"the configuration names no {source.tokens[0]}: pass image_token=, the id of the placeholders")


def image_spans(ids: Tensor, token: int) -> list[Span]:
    """The runs of placeholders, the same in every sample. Raises: InputError."""
    rows = [list(runs(row == token)) for row in ids.cpu()]
    if not any(rows):
        raise InputError(
            f"no image placeholder (id {token}) was found in the example input_ids\n"
            "  what to do: pass ids as the processor gives them, with one placeholder for each feature, or image_token="
        )
    for i, row in enumerate(rows):
        if row != rows[0]:
            raise InputError(
                f"the images of sample {i} are at {row}, and those of sample 0 at {rows[0]}: spans are static\n"
                "  what to do: pad the texts so that they agree, or split once for each layout"
            )
    return rows[0]


def finer(found: Sequence[Span], spans: Sequence[Span] | None, length: int) -> list[Span]:
    """The spans that the user names, which have to hold every placeholder and nothing else. Raises: InputError."""
    if spans is None:
        return list(found)
    given = [(int(start), int(stop)) for start, stop in spans]
    check_spans(given, length)
    places = [{p for start, stop in some for p in range(start, stop)} for some in (found, given)]
    if places[0] != places[1]:
        odd = min(places[0] ^ places[1])
        raise InputError(
            f"spans={given} contradict the example: position {odd} is {'an' if odd in places[0] else 'no'} image placeholder; "
            f"the placeholders are at {list(found)}\n  what to do: leave spans out, or divide these"
        )
    return given


def kinds_of(seen: Observed, inputs: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, tuple[int, ...]]:
    """What the decoder is given of each token beside embeddings, where it is one number for all of a span and 0 for text: it is
    known for a shorter prompt too, and new tokens need none."""
    kinds = {}
    for name in seen.beside:
        value = inputs.get(name)
        if not isinstance(value, Tensor) or value.is_floating_point() or value.shape != inputs["input_ids"].shape:
            continue
        found = [value[:, start:stop].unique().tolist() for start, stop in spans]
        text = value.clone()
        for start, stop in spans:
            text[:, start:stop] = 0
        if all(len(numbers) == 1 for numbers in found) and not bool(text.any()):
            kinds[name] = tuple(int(numbers[0]) for numbers in found)
    return kinds


def positions_of(seen: Observed, ids: Tensor, config: Any) -> Tensor:
    """(B, N) or (axes, B, N), whole numbers where they are: those that the model gave its decoder, or by counting."""
    positions = seen.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # some models pass a row of text positions before the three that their rotary embedding takes
    sections = (getattr(config, "rope_parameters", None) or {}).get("mrope_section") or ()
    positions = positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 != len(sections) else positions
    positions = positions.long() if torch.equal(positions, positions.round()) else positions
    return positions.expand(*positions.shape[:-2], *ids.shape).contiguous()
