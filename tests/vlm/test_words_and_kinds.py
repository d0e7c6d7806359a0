"""What a prompt says beside embeddings of its own table: kinds of tokens, and words with another embedding beside an image."""

import functools

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import noise, seeded
from tests.models.hf_base import DECODER, class_of
from tests.vlm.models import ids_with
from tokcompile.vlm import Generator, export, load, split


def prompt(count):
    inputs = ids_with(1, (count,))
    inputs["input_ids"][inputs["input_ids"] != 60] %= 50
    return inputs


def ovis():
    """Words of a visual vocabulary, and among them those that stand around an image in the place of the text's own."""
    config = class_of("Ovis2Config")(
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=64,
                           patch_size=8, hidden_stride=2, vocab_size=40),
        text_config=DECODER | dict(model_type="qwen2", num_hidden_layers=2), image_token_id=60, vocab_size=64, hidden_size=48,
        visual_indicator_token_ids=[55, 56, 57, 58, 59],
    )  # fmt: skip
    inputs = prompt(16) | dict(pixel_values=noise(1, 3, 64, 64))
    inputs["input_ids"][0, [4, 21]] = torch.tensor([55, 56])
    return class_of("Ovis2ForConditionalGeneration")(config), inputs


def ernie():
    """Experts for text and experts for images, to whom each token goes by its kind."""
    config = class_of("Ernie4_5_VLMoeConfig")(
        vision_config=dict(depth=1, hidden_size=48, num_heads=4, patch_size=8, spatial_merge_size=2, intermediate_size=96),
        text_config=DECODER | dict(
            num_hidden_layers=2, moe_intermediate_size=[32, 32], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2]),
        ),
        image_token_id=60, video_token_id=59, image_start_token_id=61, image_end_token_id=62, video_start_token_id=57,
        video_end_token_id=58,
    )  # fmt: skip
    inputs = prompt(12) | dict(pixel_values=noise(48, 192), image_grid_thw=torch.tensor([[1, 8, 6]]))
    kinds = (inputs["input_ids"] == 60).int()
    model = class_of("Ernie4_5_VLMoeForConditionalGeneration")(config)
    return model, inputs | dict(mm_token_type_ids=kinds, moe_mm_token_type_ids=kinds)


def molmo():
    """Features that are added to the embedding of their placeholder, each of a group of patches that an index names."""
    body = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=12)
    config = class_of("Molmo2Config")(
        vision_config=body | dict(num_hidden_layers=2, image_size=[32, 32], patch_size=8, num_position_embeddings=16),
        adapter_config=body | dict(vision_feature_layer=[-1, -2], text_hidden_size=48),
        text_config=DECODER | dict(num_hidden_layers=2, head_dim=12, vocab_size=58, additional_vocab_size=8), image_patch_id=60,
        image_start_token_id=61, image_end_token_id=62, low_res_image_start_token_id=63, frame_start_token_id=64,
        frame_end_token_id=65,
    )  # fmt: skip
    groups = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    inputs = prompt(8) | dict(
        pixel_values=noise(2, 16, 192), image_token_pooling=torch.cat([groups, groups + 16]),
        image_grids=torch.tensor([[2, 2, 2, 2]]), image_num_crops=torch.tensor([2]),
    )  # fmt: skip
    return class_of("Molmo2ForConditionalGeneration")(config), inputs | dict(
        mm_token_type_ids=(inputs["input_ids"] == 60).long()
    )


@functools.cache
def made(make):
    with seeded():
        model, inputs = make()
    return shake(model.eval()), inputs


@pytest.mark.matrix
def test_words_with_another_embedding_beside_an_image(tmp_path):
    model, inputs = made(ovis)
    parts, pixels = split(model, inputs), inputs["pixel_values"]
    assert list(parts.words) == [55, 56, 57, 58, 59]
    ids = inputs["input_ids"].clone()
    ids[0, [3, 22]] = torch.tensor([58, 57])  # which are not in the example
    want = run(
        model.generate, **inputs | dict(input_ids=ids, use_cache=True), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    assert torch.equal(Generator(parts, prefill, max_new_tokens=4)(pixels, ids, eos=()).tokens, want[:, -4:])
    export(parts, prefill, tmp_path / "folder", max_new_tokens=4)
    folder = load(tmp_path / "folder")
    assert folder(pixels, ids, eos=()).tokens.tolist() == want[:, -4:].tolist()
    assert torch.equal(folder.embed(ids)[0, [3, 4]], torch.stack([parts.words[58], parts.words[55]]))


def test_kinds_of_tokens_are_known_for_a_shorter_prompt():
    model, inputs = made(ernie)
    parts = split(model, inputs, room=[6, 4])
    ids, mask = parts.prompt.lay_out(parts.prompt.texts_of(inputs["input_ids"][0].tolist()), padded=True)
    assert parts.kinds == {"moe_mm_token_type_ids": (1,)}
    want = run(model, **inputs).logits[:, -1]
    assert error(parts(inputs["pixel_values"], ids, mask)["logits"][:, -1], want) < 1e-5
    parts = split(model, inputs)
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[1], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    gone = dropped(run(prefill, **parts.language.kwargs).kept["s0_index"][0], *parts.spans[0])
    result = Generator(parts, prefill, max_new_tokens=6)(inputs["pixel_values"], inputs["input_ids"], eos=(), keep_logits=True)
    with hidden(gone, {1 + 1 + 2 * step for step in range(6)}):  # behind the one layer of the tower
        want = run(model.generate, **inputs | {"use_cache": True}, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(result.tokens, want[:, -6:])


def test_features_onto_the_embedding_of_their_placeholder():
    model, inputs = made(molmo)
    parts, pixels, ids = split(model, inputs), inputs["pixel_values"], inputs["input_ids"]
    assert error(parts(pixels, ids)["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5
    fewer = tokcompile.optimize(*parts.vision, method="random", budget=tokcompile.Tokens(2), where=[1], outputs="reduced")
    assert not fewer.report.recoveries
    left = parts.after(fewer)  # two groups of each crop, whose members are whole
    seen = left.see(pixels)
    assert (left.spans, seen["kept"].shape) == ([(5, 9)], (1, 4))
    assert error(seen["features"], parts.see(pixels)["features"].reshape(1, 8, -1)[:, seen["kept"][0]]) < 1e-5
    with hidden(dropped(seen["kept"][0], *parts.spans[0]), {3, 4}):  # behind the tower and the pooling
        want = run(model, **inputs).logits[:, -1]
    assert error(left(pixels, ids)["logits"][:, -1], want) < 1e-5
