"""Small vision-language models of transformers that pool or merge their patches in ways of their own behind the tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .family import Family, noise, seeded, tokens
from .hf_base import BODY, DECODER, class_of

_QWEN2, _LLAMA = dict(model_type="qwen2", **DECODER), dict(model_type="llama", **DECODER)
Made = tuple[nn.Module, int, dict[str, Any]]  # the model, placeholders a prompt, and the pixels of `batch` images


def gemma4(padding: int = 0, batch: int = 1) -> Made:
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
    places = torch.cat([places, torch.full((1, padding, 2), -1)], 1).repeat(batch, 1, 1)
    pixels = dict(pixel_values=noise(batch, 48 + padding, 192).clamp(0, 1), image_position_ids=places)
    return class_of("Gemma4ForConditionalGeneration")(config), 12, pixels


def video_llama(merge: int = 2, batch: int = 1) -> Made:
    """Patches come square by square, and are interpolated to half the size, or to the same."""
    config = class_of("VideoLlama3Config")(
        vision_config=dict(BODY, patch_size=8), text_config=_QWEN2, image_token_id=60, video_token_id=59
    )
    grid = torch.tensor([[1, 4 * merge, 3 * merge]] * batch)
    pixels = dict(pixel_values=noise(batch, 12 * merge**2, 192).flatten(0, 1), image_grid_thw=grid)
    model = class_of("VideoLlama3ForConditionalGeneration")(config)
    return model, 12, pixels | dict(image_merge_sizes=torch.tensor([merge] * batch))


def kimi(batch: int = 1) -> Made:
    """Frames are averaged, and squares joined behind a norm."""
    config = class_of("Kimi_K25Config")(
        vision_config=dict(
            patch_size=8, pos_emb_height=8, pos_emb_width=8, pos_emb_time=2, num_attention_heads=4, num_hidden_layers=4,
            hidden_size=48, intermediate_size=96,
        ),
        text_config=_LLAMA, image_token_id=60, video_token_id=59, vision_start_token_id=61, vision_end_token_id=62,
        projection_hidden_size=48,
    )  # fmt: skip
    pixels = dict(pixel_values=noise(batch, 48, 3, 8, 8).flatten(0, 1), image_grid_thw=torch.tensor([[1, 8, 6]] * batch))
    return class_of("Kimi_K25ForConditionalGeneration")(config), 12, pixels


def hunyuan(batch: int = 1) -> Made:
    """A convolution of windows side by side, one of single places, a newline token a row, and one at both ends."""
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 1, 1])
    vision = dict(BODY, out_hidden_size=48, patch_size=8, spatial_merge_size=2, max_image_size=64, min_image_size=16)
    config = class_of("HunYuanVLConfig")(
        vision_config=vision | dict(text_hidden_size=48), text_config=DECODER | dict(head_dim=12, rope_parameters=rope),
        image_token_id=60, im_start_id=61, im_end_id=62, im_newline_id=59,
    )  # fmt: skip
    pixels = dict(pixel_values=noise(batch, 48, 192).flatten(0, 1), image_grid_thw=torch.tensor([[1, 8, 6]] * batch))
    return class_of("HunYuanVLForConditionalGeneration")(config), 18, pixels


def pooled(make: Callable[..., Made], batch: int) -> tuple[nn.Module, tuple, dict]:
    """The model, and prompts of 5 of text, the placeholders, and 3 of text."""
    with seeded():
        model, count, pixels = make(batch=batch)
    text = tokens(batch, 8, 55)
    ids = torch.cat([text[:, :5], torch.full((batch, count), 60), text[:, 5:]], 1)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False) | pixels
    if "image_position_ids" in pixels or count == 18:  # Gemma 4 and Hunyuan-VL
        inputs["mm_token_type_ids"] = (ids == 60).int()
    return model.eval(), (), inputs


POOLED = [
    Family("hf/gemma4", partial(pooled, gemma4), "transformers", 8, "patches pooled by places that are an input"),
    Family("hf/video_llama_3", partial(pooled, video_llama), "transformers", 8, "features interpolated to half the size"),
    Family("hf/kimi_k25", partial(pooled, kimi), "transformers", 8, "squares joined behind a norm"),
    Family("hf/hunyuan_vl", partial(pooled, hunyuan), "transformers", 8, "convolutions as wide as their step, newline tokens"),
]
