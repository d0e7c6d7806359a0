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
from tests.models.family import noise, seeded
from tests.models.hf_base import BODY, DECODER, class_of
from tests.vlm.models import ids_with
from tokcompile.vlm import split

QWEN2, LLAMA = dict(model_type="qwen2", **DECODER), dict(model_type="llama", **DECODER)


def gemma4(padding):
    """Patches are pooled 2 x 2 by places that are an input, in which padding has none."""
    body = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, head_dim=12)
    vision = dict(body, num_key_value_heads=4, patch_size=8, pooling_kernel_size=2, position_embedding_size=64)
    text = DECODER | dict(
        head_dim=12, global_head_dim=12, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
    )  # fmt: skip
    others = dict(video_token_id=59, audio_token_id=58, boa_token_id=57, eoa_token_index=56, boi_token_id=61, eoi_token_id=62)
    config = class_of("Gemma4Config")(vision_config=vision, text_config=text, audio_config=None, image_token_id=60, **others)
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(8), indexing="xy"), -1).reshape(1, -1, 2)
    places = torch.cat([places, torch.full((1, padding, 2), -1)], 1)
    pixels = dict(pixel_values=noise(1, 48 + padding, 192).clamp(0, 1), image_position_ids=places)
    return class_of("Gemma4ForConditionalGeneration")(config), pixels


def video_llama(merge):
    """Patches come square by square, and are interpolated to half the size, or to the same."""
    config = class_of("VideoLlama3Config")(
        vision_config=dict(BODY, patch_size=8), text_config=QWEN2, image_token_id=60, video_token_id=59
    )
    grid = torch.tensor([[1, 4 * merge, 3 * merge]])
    pixels = dict(pixel_values=noise(1, 12 * merge**2, 192)[0], image_grid_thw=grid)
    return class_of("VideoLlama3ForConditionalGeneration")(config), pixels | dict(image_merge_sizes=torch.tensor([merge]))


def kimi():
    """Frames are averaged, and squares joined behind a norm."""
    config = class_of("Kimi_K25Config")(
        vision_config=dict(
            patch_size=8, pos_emb_height=8, pos_emb_width=8, pos_emb_time=2, num_attention_heads=4, num_hidden_layers=4,
            hidden_size=48, intermediate_size=96,
        ),
        text_config=LLAMA, image_token_id=60, video_token_id=59, vision_start_token_id=61, vision_end_token_id=62,
        projection_hidden_size=48,
    )  # fmt: skip
    pixels = dict(pixel_values=noise(1, 48, 3, 8, 8)[0], image_grid_thw=torch.tensor([[1, 8, 6]]))
    return class_of("Kimi_K25ForConditionalGeneration")(config), pixels


def hunyuan():
    """A convolution of windows side by side, one of single places, a newline token a row, and one at both ends."""
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 1, 1])
    vision = dict(BODY, out_hidden_size=48, patch_size=8, spatial_merge_size=2, max_image_size=64, min_image_size=16)
    config = class_of("HunYuanVLConfig")(
        vision_config=vision | dict(text_hidden_size=48), text_config=DECODER | dict(head_dim=12, rope_parameters=rope),
        image_token_id=60, im_start_id=61, im_end_id=62, im_newline_id=59,
    )  # fmt: skip
    pixels = dict(pixel_values=noise(1, 48, 192)[0], image_grid_thw=torch.tensor([[1, 8, 6]]))
    return class_of("HunYuanVLForConditionalGeneration")(config), pixels


def squares(group):
    """The patches of a square of 2 x 2 in 8 rows of 6."""
    first = group // 3 * 12 + group % 3 * 2
    return [first, first + 1, first + 6, first + 7]


MODELS = {  # the patches of each token; how many tokens of the prompt the image has, and which is which
    "gemma4": (functools.partial(gemma4, 0), squares, 12, int),
    "gemma4 with padding": (functools.partial(gemma4, 16), squares, 12, int),
    "video_llama_3": (functools.partial(video_llama, 2), lambda g: range(4 * g, 4 * g + 4), 12, int),
    "video_llama_3 alone": (functools.partial(video_llama, 1), lambda g: [g], 12, int),
    "kimi_k25": (kimi, squares, 12, int),
    "hunyuan_vl": (hunyuan, squares, 18, lambda g: 1 + g + g // 3),
}


@functools.cache
def made(name):
    with seeded():
        try:
            model, pixels = MODELS[name][0]()
        except AttributeError as error:  # an older version of transformers
            pytest.skip(str(error))
    inputs = ids_with(1, (MODELS[name][2],)) | pixels
    ids = inputs["input_ids"]
    ids[(ids > 54) & (ids != 60)] = 7
    if name != "kimi_k25" and "video" not in name:
        inputs["mm_token_type_ids"] = (ids == 60).int()
    return shake(model.eval()), inputs


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


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_is_what_the_original_gives_with_the_others_hidden(name):
    model, inputs = made(name)
    _, patches, count, feature = MODELS[name]
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


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma4"])  # with padding it is the same and more
def test_both_oracles(name):
    model, inputs = made(name)
    check = tokcompile.check(model, kwargs=inputs, blocks=[0, 3])
    assert check.ok, str(check)
    assert not [r for r in check.results if "recover" in r.note]


@pytest.mark.parametrize("name", ["gemma4 with padding", "hunyuan_vl"])
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
