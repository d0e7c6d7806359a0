"""What rows of small transformers models are made of: sizes, inputs, configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import nn

from .family import Family, noise, seeded, tokens

Inputs = Callable[[int], dict]

# 56 px and patch 8 give 7 x 7 = 49 patches, width 48 with 4 heads of 12
BODY = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
VIT = BODY | dict(image_size=56, patch_size=8)
DINO = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=8, layerscale_value=1e-5)
TEXT = BODY | dict(vocab_size=64, max_position_embeddings=20, bos_token_id=0, eos_token_id=63, pad_token_id=0)
DECODER = BODY | dict(
    vocab_size=64, max_position_embeddings=128, num_key_value_heads=2, bos_token_id=0, eos_token_id=63, pad_token_id=0
)
EAGER = dict(attn_implementation="eager")
BEIT = VIT | dict(layer_scale_init_value=1e-5, drop_path_rate=0.0)
QWEN = dict(depth=4, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)


def class_of(name: str) -> type:
    """A transformers class by name, or by dotted path where the package does not export it."""
    import transformers

    return attrgetter(name)(transformers)


def config_of(name: str, options: dict):
    """A transformers configuration; a value ("ConfigName", options) inside `options` is a nested one."""
    nested = {k: config_of(*v) if isinstance(v, tuple) and isinstance(v[0], str) else v for k, v in options.items()}
    return class_of(name)(**nested)


def build(model: str, config: str, options: dict, inputs: Inputs, batch: int) -> tuple[nn.Module, tuple, dict]:
    """Builds `model` by class name from `config`; every input is a keyword argument."""
    with seeded():
        built = class_of(model)(config_of(config, options))
    return built.eval(), (), inputs(batch)


def row(name: str, model: str, config: str, options: dict, inputs: Inputs, depth: int = 4, note: str = "") -> Family:
    """One table row."""
    return Family(f"hf/{name}", partial(build, model, config, options, inputs), "transformers", depth, note)


def image(size: int = 56, **more) -> Inputs:
    """One image a sample, and constant arguments of the call."""
    return lambda batch: dict(pixel_values=noise(batch, 3, size, size), **more)


def video(frames: int, size: int, key: str = "pixel_values", **more) -> Inputs:
    """One clip a sample."""
    return lambda batch: {key: noise(batch, frames, 3, size, size), **more}


def embeds(length: int = 40, width: int = 48, **more) -> Inputs:
    """Embeddings for a decoder's prefill."""
    return lambda batch: dict(inputs_embeds=noise(batch, length, width), **more)


def pair(batch: int) -> dict:
    """An image and 12 text tokens that end with the end-of-text token."""
    ids = tokens(batch, 12, 64)
    ids[:, -1] = 63
    return dict(pixel_values=noise(batch, 3, 56, 56), input_ids=ids, attention_mask=torch.ones_like(ids))


def qwen(batch: int) -> dict:
    """Patches of `batch` images of 8 x 6 patches in one flat sequence."""
    return dict(hidden_states=noise(batch, 48, 3 * 2 * 8 * 8).flatten(0, 1), grid_thw=torch.tensor([[1, 8, 6]] * batch))
