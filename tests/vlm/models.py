"""Vision-language models beyond the families: two images, tiles with newline tokens, padding on the left."""

import functools

import pytest
import torch

import tokcompile
from tests.conftest import build, run
from tests.models import shake
from tests.models.family import noise, seeded, tokens
from tests.shared import shared
from tokcompile.vlm import Parts, split

FAMILIES = [
    "llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "gemma3", "smolvlm", "idefics3",
]  # fmt: skip


@functools.cache
def vlm(name, batch=1):
    """(model, inputs) of a family, or of one of the functions below."""
    if name in OTHERS:
        return OTHERS[name](batch)
    model, _, inputs = build(f"hf/{name}", batch)
    return model, inputs


@functools.cache
def parts_of(name, batch=1, padded=None, room=None):
    """The model in parts, which are shared between tests and never changed."""
    return lasting(split(*vlm(name, batch), padded=padded, room=room))


@functools.cache
def reduced_parts(name, batch=1, padded=None, room=None, **options):
    """The same behind a vision part that gives fewer features."""
    parts = parts_of(name, batch, padded, room)
    return lasting(parts.after(tokcompile.optimize(*parts.vision, outputs="reduced", **options)))


def lasting(parts: Parts) -> Parts:
    shared(parts.vision.module)
    shared(parts.language.module)
    return parts


def ids_with(batch, counts, token=60):
    """5 of text, then each image's placeholders and 3 of text."""
    text = tokens(batch, 5 + 3 * len(counts), 59)
    pieces = [text[:, :5]]
    for i, count in enumerate(counts):
        pieces += [torch.full((batch, count), token), text[:, 5 + 3 * i : 8 + 3 * i]]
    ids = torch.cat(pieces, 1)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def llava_two(batch):
    """Two images a sample."""
    model, _ = vlm("llava")
    return model, ids_with(batch, (49, 49)) | dict(pixel_values=noise(2 * batch, 3, 56, 56))


def qwen_two(name):
    """Two images of different size in each sample, in one sequence."""

    def make(batch):
        model, _ = vlm(name)
        grids = torch.tensor([[1, 8, 6], [1, 4, 8]] * batch)
        inputs = ids_with(batch, (12, 8))
        inputs |= dict(mm_token_type_ids=(inputs["input_ids"] == 60).int(), image_grid_thw=grids)
        return model, inputs | dict(pixel_values=noise(batch, 80, 3 * 2 * 8 * 8).flatten(0, 1))

    return make


def llava_next(batch, tiles=1, size=(56, 56), count=49 + 7 * 8):
    """A base view and tiles of 7 x 7 side by side, with a newline token a row."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    small = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
    text = LlamaConfig(
        **small,
        vocab_size=64,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=63,
        pad_token_id=0,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**small, image_size=56, patch_size=8), text_config=text, image_token_index=60,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )  # fmt: skip
    with seeded():
        model = shake(LlavaNextForConditionalGeneration(config).eval())
    sizes = torch.tensor([size] * batch)
    return model, ids_with(batch, (count,)) | dict(pixel_values=noise(batch, 1 + tiles, 3, 56, 56), image_sizes=sizes)


def onevision_cut(batch):
    """A base view and one tile whose upper and lower row are padding."""
    model, inputs = vlm("llava_onevision", batch)
    return model, inputs | ids_with(batch, (49 + 5 * 8,)) | dict(image_sizes=torch.tensor([[40, 56]] * batch))


def video_llava(batch, frames=3):
    """A clip whose frames keep their class tokens among the features: 1 + 16 each."""
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    small = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=64, num_key_value_heads=2, max_position_embeddings=256),
        image_token_index=60, video_token_index=61,
    )  # fmt: skip
    with seeded():
        model = shake(VideoLlavaForConditionalGeneration(config).eval())
    return model, ids_with(batch, (17 * frames,), 61) | dict(pixel_values_videos=noise(batch, frames, 3, 32, 32))


def gemma4(batch):
    """Inputs of single layers beside the embeddings, and two layers that attend to the keys of earlier ones."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    body = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, head_dim=12)
    vision = dict(body, num_key_value_heads=4, patch_size=8, pooling_kernel_size=2, position_embedding_size=64)
    text = dict(
        body, num_key_value_heads=2, global_head_dim=12, vocab_size=64, vocab_size_per_layer_input=64, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=63, pad_token_id=0,
    )  # fmt: skip
    others = dict(video_token_id=59, audio_token_id=58, boa_token_id=57, eoa_token_index=56, boi_token_id=61, eoi_token_id=62)
    with seeded():
        config = Gemma4Config(vision_config=vision, text_config=text, audio_config=None, image_token_id=60, **others)
        model = shake(Gemma4ForConditionalGeneration(config).eval())
    inputs = ids_with(batch, (12,))
    inputs["input_ids"][(inputs["input_ids"] > 55) & (inputs["input_ids"] != 60)] = 7
    patches = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(6), indexing="xy"), -1).reshape(1, -1, 2)
    pixels = dict(pixel_values=noise(batch, 48, 192).clamp(0, 1), image_position_ids=patches.repeat(batch, 1, 1))
    return model, inputs | pixels | dict(mm_token_type_ids=(inputs["input_ids"] == 60).int())


def llama4(batch):
    """Three layers in four attend within chunks of 16 positions."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    body = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4)
    vision = dict(body, image_size=64, patch_size=8, intermediate_size=192, vision_output_dim=48, projector_input_dim=48)
    text = dict(
        body, num_key_value_heads=2, vocab_size=64, head_dim=12, intermediate_size=96, intermediate_size_mlp=96,
        num_local_experts=2, attention_chunk_size=16, no_rope_layers=[1, 1, 1, 0], max_position_embeddings=128,
        layer_types=["chunked_attention"] * 3 + ["full_attention"], bos_token_id=0, eos_token_id=63, pad_token_id=0,
    )  # fmt: skip
    with seeded():
        config = Llama4Config(
            vision_config=vision | dict(projector_output_dim=48), text_config=text, image_token_index=60, boi_token_index=61
        )
        model = shake(Llama4ForConditionalGeneration(config).eval())
    inputs = ids_with(batch, (16,)) | dict(pixel_values=noise(batch, 3, 64, 64))
    try:
        run(model, **inputs)
    except AttributeError as error:  # transformers 5.24
        pytest.skip(f"this version of transformers cannot run Llama 4: {error}")
    return model, inputs


def left(name, pads=3):
    """The same prompt behind padding on its left, with the positions that generation gives it."""

    def make(batch):
        model, inputs = vlm(name, batch)
        inputs = dict(inputs)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([torch.zeros_like(inputs[key][:, :1]).repeat(1, pads), inputs[key]], 1)
        if "qwen" not in name:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions + 1 if name == "paligemma" else positions
        return model, inputs

    return make


OTHERS = {
    "llava_two": llava_two,
    "qwen2_vl_two": qwen_two("qwen2_vl"),
    "qwen2_5_vl_two": qwen_two("qwen2_5_vl"),
    "qwen3_vl_two": qwen_two("qwen3_vl"),
    "llava_next": llava_next,
    "llava_next_cut": functools.partial(llava_next, tiles=2, size=(40, 112), count=49 + 5 * 15),
    "llava_onevision_cut": onevision_cut,
    "gemma4": gemma4,
    "llama4": llama4,
    **{f"{name}_left": left(name) for name in ("llava", "qwen2_vl", "qwen3_vl", "paligemma", "gemma3", "llama4")},
}
