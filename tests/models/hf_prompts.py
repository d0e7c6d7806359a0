"""Example inputs of small transformers models that take images and text: prompts with placeholders, and the images for them."""

from __future__ import annotations

import torch

from .family import noise, tokens
from .hf_base import Inputs, qwen


def prompt(image_tokens: int, size: int = 56, type_ids: bool = False) -> Inputs:
    """An image and a prompt: 5 text tokens, the image's placeholders (id 60), 7 text tokens."""

    def make(batch: int) -> dict:
        ids = prompt_ids(batch, image_tokens)
        more = dict(token_type_ids=torch.zeros_like(ids)) if type_ids else {}
        return dict(
            input_ids=ids,
            pixel_values=noise(batch, 3, size, size),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **more,
        )

    return make


def prompt_ids(batch: int, image_tokens: int) -> torch.Tensor:
    """5 text tokens, placeholders (id 60), 7 text tokens."""
    text = tokens(batch, 12, 60)
    return torch.cat([text[:, :5], torch.full((batch, image_tokens), 60), text[:, 5:]], dim=1)


def mllama_prompt(batch: int) -> dict:
    """An image in three of four tiles, which all text but the first five tokens attends to."""
    ids = prompt_ids(batch, 1)
    tiles = torch.tensor([1, 1, 1, 0]).expand(batch, 1, 4)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=noise(batch, 1, 4, 3, 56, 56),
        aspect_ratio_ids=torch.full((batch, 1), 4),
        aspect_ratio_mask=tiles,
        cross_attention_mask=tiles[:, None] * (torch.arange(ids.shape[1]) > 4).long()[:, None, None],
        use_cache=False,
    )


def pi0_prompt(batch: int) -> dict:
    """Two cameras a sample, the state of the robot and noise for five actions."""
    ids = prompt_ids(batch, 2 * 49)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=noise(batch, 2, 3, 56, 56),
        pixel_attention_mask=torch.ones(batch, 2, dtype=torch.bool),
        state=noise(batch, 6),
        noise=noise(batch, 5, 6),
        timestep=torch.full((batch,), 0.5),
        use_cache=False,
    )


def qwen_prompt(batch: int) -> dict:
    """A prompt with 12 placeholders a sample, for images of 8 x 6 patches merged by 2 x 2."""
    ids = prompt_ids(batch, 12)
    vision = qwen(batch)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 60).int(),
        pixel_values=vision["hidden_states"],
        image_grid_thw=vision["grid_thw"],
        use_cache=False,
    )


def qwen_two_images(batch: int) -> dict:
    """Two images a sample, of 8 x 6 and 4 x 6 patches: 12 and 6 placeholders, with text around both."""
    ids = torch.cat([prompt_ids(batch, 12), prompt_ids(batch, 6)], dim=1)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 60).int(),
        pixel_values=noise(batch, 48 + 24, 3 * 2 * 8 * 8).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 8, 6], [1, 4, 6]] * batch),
        use_cache=False,
    )


def smolvlm_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders and one image (the second axis counts images) a sample."""
    return prompt(16, 64)(batch) | dict(pixel_values=noise(batch, 1, 3, 64, 64))


def lfm2_prompt(batch: int) -> dict:
    """A prompt with 12 placeholders a sample, for images of 8 x 6 patches merged by 2 x 2."""
    return prompt(12)(batch) | dict(
        pixel_values=noise(batch, 48, 3 * 8 * 8),
        spatial_shapes=torch.tensor([[8, 6]] * batch),
        pixel_attention_mask=torch.ones(batch, 48, dtype=torch.long),
    )


def gemma3_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders a sample, marked as image tokens."""
    inputs = prompt(16, 64)(batch)
    return inputs | dict(token_type_ids=(inputs["input_ids"] == 60).long())


def tiled_prompt(batch: int, count: int, views: int, width: int) -> dict:
    """A prompt with `count` placeholders a sample for an image 56 pixels high, given as a base view and tiles."""
    ids = prompt_ids(batch, count)
    return dict(
        input_ids=ids,
        pixel_values=noise(batch, views, 3, 56, 56),
        image_sizes=torch.tensor([[56, width]] * batch),
        attention_mask=torch.ones_like(ids),
        use_cache=False,
    )


def onevision_prompt(batch: int) -> dict:
    """A prompt for one image given as a base view and one tile of 7 x 7 patches, with a newline token a row."""
    return tiled_prompt(batch, 49 + 49 + 7, views=2, width=56)


def anyres_prompt(batch: int) -> dict:
    """A prompt for one wide image: a base view of 7 x 7 patches and two tiles side by side, with a newline token a row."""
    return tiled_prompt(batch, 49 + 7 * (14 + 1), views=3, width=112)


def mistral3_prompt(batch: int) -> dict:
    """A prompt with 16 placeholders a sample and the size of each image."""
    return prompt(16, 64)(batch) | dict(image_sizes=torch.tensor([[64, 64]] * batch))


def idefics2_prompt(batch: int) -> dict:
    """A prompt with 8 placeholders, one for each latent of the resampler, and one image a sample."""
    return prompt(8)(batch) | dict(pixel_values=noise(batch, 1, 3, 56, 56))
