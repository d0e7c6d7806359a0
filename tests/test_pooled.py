"""Models that pool or merge their patches in ways of their own behind the tower: reduced inside of it, their prompt is
shorter, and it holds what the original gives with the others hidden."""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import counts, error, run
from tests.models import shake
from tests.models.hf_pooled import gemma4, hunyuan, kimi, pooled, video_llama
from tests.shared import shared
from tokcompile.vlm import split


def squares(group):
    """The patches of a square of 2 x 2 in 8 rows of 6."""
    first = group // 3 * 12 + group % 3 * 2
    return [first, first + 1, first + 6, first + 7]


MODELS = {  # the patches of each token; which token of the prompt's image is which
    "gemma4": (gemma4, squares, int),
    "gemma4 with padding": (functools.partial(gemma4, 16), squares, int),
    "video_llama_3": (video_llama, lambda g: range(4 * g, 4 * g + 4), int),
    "video_llama_3 alone": (functools.partial(video_llama, 1), lambda g: [g], int),
    "kimi_k25": (kimi, squares, int),
    "hunyuan_vl": (hunyuan, squares, lambda g: 1 + g + g // 3),
}
PADDED = pytest.param("gemma4 with padding", marks=pytest.mark.matrix)


@functools.cache
def made(name):
    try:
        model, _, inputs = pooled(MODELS[name][0], 1)
    except AttributeError as error:  # an older version of transformers
        pytest.skip(str(error))
    return shared(shake(model)), inputs


@contextmanager
def unseen(tower, prompt, gone, placeholders):
    """Patches that nobody sees behind block 1 of the tower, and tokens that nobody sees in the prompt."""
    fused, calls = nn.functional.scaled_dot_product_attention, []

    def attend(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        length = key.shape[2]
        calls.append(length)
        hidden = {tower: gone if calls.count(tower) > 2 else [], prompt: placeholders}[length]
        mask = torch.ones(length, length, dtype=torch.bool)
        mask = attn_mask if attn_mask is not None else mask.tril() if is_causal else mask
        there = torch.ones(length, dtype=torch.bool)
        there[list(hidden)] = False
        mask = mask & there if mask.dtype is torch.bool else mask.masked_fill(~there, -1e9)
        return fused(query, key, value, attn_mask=mask, **kwargs)

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = fused


def kept_groups(name, kept):
    """Which squares are left; an index among features with newline tokens is one of places on the map."""
    if name != "hunyuan_vl":
        return kept["s0_index"][0].tolist()
    return [p // 4 * 3 + p % 4 for p in kept["s0_p_index"][0].tolist() if p % 4 < 3]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma4"])  # with padding it is the same and more
def test_what_is_left_is_what_the_original_gives_with_the_others_hidden(name):
    model, inputs = made(name)
    _, patches, feature = MODELS[name]
    count = int((inputs["input_ids"] == 60).sum())
    options = dict(kwargs=inputs, method="random", where=[1])
    assert error(run(tokcompile.optimize(model, **options, budget=1.0), **inputs), run(model, **inputs)) == 0
    fast = tokcompile.optimize(model, **options, budget=0.5, outputs="reduced")
    assert not fast.report.recoveries
    out, kept = run(fast, **inputs)
    groups = kept_groups(name, kept)
    assert len(groups) == 6 == counts(fast)[0][2]
    length = inputs["input_ids"].shape[1]
    gone = [g for g in range(12) if g not in groups]
    placeholders = [5 + feature(g) for g in gone]
    tower = inputs["pixel_values"].shape[-2] if inputs["pixel_values"].ndim < 4 else 48
    with unseen(tower, length, [p for g in gone for p in patches(g)], placeholders):
        want = run(model, **inputs).logits[:, [p for p in range(length) if p not in placeholders]]
    assert want.shape[1] == 8 + count - 6
    assert error(out.logits, want) < 1e-5


@pytest.mark.parametrize("name", [PADDED, "video_llama_3 alone"])  # the others are families
def test_both_oracles(name):
    model, inputs = made(name)
    check = tokcompile.check(model, kwargs=inputs, blocks=[0, 3])
    assert check.ok, str(check)
    assert not [r for r in check.results if "recover" in r.note]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [PADDED, "hunyuan_vl"])
def test_in_parts_and_in_a_file(name, tmp_path):
    model, inputs = made(name)
    options = dict(method="divprune", budget=0.5, where=[1], outputs="reduced")
    whole = tokcompile.optimize(model, kwargs=inputs, **options)
    parts = split(model, inputs)
    parts = parts.after(tokcompile.optimize(*parts.vision, **options))
    logits = parts(inputs["pixel_values"], inputs["input_ids"])["logits"]
    assert error(logits[:, -1], run(whole, **inputs).output.logits[:, -1]) < 1e-5
    assert whole.export_onnx(tmp_path / "whole.onnx").error < 1e-4


def test_patches_at_other_places_are_refused():
    model, inputs = made("gemma4")
    fast = tokcompile.optimize(model, kwargs=inputs, method="random", where=[1], outputs="reduced")
    with pytest.raises(tokcompile.InputError, match="48 tokens are pooled to 12 by where they lie"):
        run(fast, **inputs | dict(image_position_ids=inputs["image_position_ids"].flip(2)))
