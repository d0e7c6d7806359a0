"""A model in parts gives what the model gives, and what cannot be taken apart is refused."""

import pytest
import torch
from torch import nn

from tests.conftest import error, run
from tests.llm.by_hand import cache_of
from tests.models.family import noise
from tests.vlm.models import FAMILIES, OTHERS, ids_with, vlm
from tokcompile import InputError, UnsupportedGraph
from tokcompile.vlm import split


def composed(parts, inputs):
    mask = inputs["attention_mask"] if "attention_mask" in parts.language.kwargs else None
    return parts(inputs["pixel_values"], inputs["input_ids"], mask)


@pytest.mark.every(2)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_parts_together_are_the_model(name, batch):
    model, inputs = vlm(name, batch)
    parts = split(model, inputs, all_logits=True)
    seen = inputs["attention_mask"].bool()
    got, want = composed(parts, inputs)["logits"], run(model, **inputs).logits
    assert error(got[seen], want[seen]) < 1e-5
    assert parts.spans == [
        (start, stop) for start, stop in parts.spans if bool((inputs["input_ids"][:, start:stop] == 60).all())
    ]
    assert sum(stop - start for start, stop in parts.spans) == int((inputs["input_ids"][0] == 60).sum())


def video(name):
    """Two frames of one clip in a prompt of a Qwen model: 24 features of 8 x 6 patches each."""
    model, _ = vlm(name)
    inputs = ids_with(1, (24,), model.config.video_token_id)
    there = inputs["input_ids"] == model.config.video_token_id
    pixels = dict(pixel_values_videos=noise(1, 96, 3 * 2 * 8 * 8)[0], video_grid_thw=torch.tensor([[2, 8, 6]]))
    return model, inputs | pixels | dict(mm_token_type_ids=2 * there.int())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_video_is_seen_like_images(name):
    model, inputs = video(name)
    parts = split(model, inputs, all_logits=True)
    clip = inputs["pixel_values_videos"]
    assert parts.spans == [(5, 29)]
    for pixels in (clip, clip.flip(0)):  # another clip of the same size too
        want = run(model, **{**inputs, "pixel_values_videos": pixels}).logits
        assert error(parts(pixels, inputs["input_ids"])["logits"], want) < 1e-5


def test_images_and_videos_in_one_call():
    model, inputs = video("qwen2_vl")
    refused("split once for images and once for videos", model, inputs | dict(pixel_values=inputs["pixel_values_videos"]))
    model, inputs = vlm("llava")
    refused("no video_token_id", model, inputs | dict(pixel_values=None, pixel_values_videos=inputs["pixel_values"]))


@pytest.mark.parametrize("same", [True, False], ids=["a view", "a copy"])
def test_pixels_that_are_passed_on_as_something_else(same, monkeypatch):
    """A view of all of them is still them; of a copy it cannot be known."""
    model, inputs = vlm("llava")
    forward = model.model.forward

    def call(pixel_values=None, **more):
        if pixel_values is not None:
            pixel_values = pixel_values[:1] if same else pixel_values * 1
        return forward(pixel_values=pixel_values, **more)

    monkeypatch.setattr(model.model, "forward", call)
    if same:
        other = inputs["pixel_values"].flip(-1)
        parts = split(model, inputs)
        assert not torch.equal(parts.see(other)["features"], parts.see(inputs["pixel_values"])["features"])
    else:
        refused("not called with the example's pixel values", model, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_caches_are_the_models_own(name):
    model, inputs = vlm(name)
    got = composed(split(model, inputs), inputs)
    want = run(model, **{**inputs, "use_cache": True})
    cache = want[cache_of(model)]
    assert got["logits"].shape[1] == 1
    for layer, (keys, values) in enumerate(zip(got["keys"], got["values"])):
        there = cache.layers[layer]
        last = there.keys.shape[2]  # a sliding layer keeps its window only
        assert error([keys[:, :, -last:], values[:, :, -last:]], [there.keys, there.values]) < 1e-5


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_each_part_holds_only_its_own_weights(name):
    model, inputs = vlm(name)
    parts = split(model, inputs)
    vision, language = ({id(p) for p in part.module.parameters()} for part in (parts.vision, parts.language))
    assert not vision & language
    assert {id(p) for p in model.parameters()} == vision | language | {id(p) for p in parts.embeddings.module.parameters()}


@pytest.mark.parametrize(
    ("name", "next_position"), [("llava", 61), ("paligemma", 62), ("qwen2_vl", 16), ("qwen3_vl", 16), ("llava_left", 61)]
)
def test_next_position(name, next_position):
    """Qwen's image of 4 x 3 tokens takes 4 positions; PaliGemma counts from 1; padding does not count."""
    model, inputs = vlm(name)
    assert split(model, inputs).next_position.tolist() == [[next_position]]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma", "gemma3", "smolvlm"])
def test_the_model_is_left_as_it_was(name):
    model, inputs = vlm(name)
    before = run(model, **inputs).logits
    state = [(m, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    split(model, inputs)
    assert state == [(m, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(run(model, **inputs).logits, before)


def refused(match, model, inputs, kind=InputError, **options):
    with pytest.raises(kind, match=match):
        split(model, inputs, **options)


def test_inputs_that_say_nothing_of_an_image():
    model, inputs = vlm("llava")
    text = torch.full_like(inputs["input_ids"], 7)
    refused(r"no image placeholder \(id 60\) was found", model, {**inputs, "input_ids": text})
    refused("no image placeholder .id 61. was found", model, inputs, image_token=61)
    refused("the example inputs have no pixel_values", model, {"input_ids": text})
    refused("the example inputs have no input_ids", model, {"pixel_values": inputs["pixel_values"]})
    refused(r"attention_mask has the shape \(1, 9\)", model, {**inputs, "attention_mask": torch.ones(1, 9)})


def test_spans_that_contradict_the_example():
    model, inputs = vlm("llava")
    refused("position 54 is no image placeholder", model, inputs, spans=[(5, 55)])
    refused("position 5 is an image placeholder", model, inputs, spans=[(6, 54)])
    refused("in order and apart", model, inputs, spans=[(5, 30), (20, 54)])
    refused("in order and apart", model, inputs, spans=[(5, 100)])
    assert split(model, inputs, spans=[(5, 30), (30, 54)]).spans == [(5, 30), (30, 54)]


def test_too_few_placeholders():
    model, inputs = vlm("llava")
    ids = inputs["input_ids"].clone()
    ids[:, 53] = 7
    refused("does not run on the example inputs.*features", model, {**inputs, "input_ids": ids})


def test_samples_with_their_images_at_other_places():
    model, inputs = vlm("llava", 2)
    ids = inputs["input_ids"].clone()
    ids[1] = ids[1].roll(1)
    refused(
        r"the images of sample 1 are at \[\(6, 55\)\], and those of sample 0 at \[\(5, 54\)\]",
        model,
        {**inputs, "input_ids": ids},
    )


def test_later_prompts_have_their_images_at_the_same_places():
    model, inputs = vlm("llava")
    parts = split(model, inputs)
    with pytest.raises(InputError, match=r"input_ids\[0, 5\] is \d+, and the parts were made for image placeholders"):
        parts(inputs["pixel_values"], inputs["input_ids"].roll(1))
    with pytest.raises(InputError, match="the parts were made for"):
        parts(inputs["pixel_values"], inputs["input_ids"][:, 1:])


def test_models_that_are_none():
    model, inputs = vlm("llava")
    refused("has no decoder that this function finds", nn.Linear(2, 2).eval(), inputs, image_token=60)
    refused("no image_token_id", nn.Linear(2, 2).eval(), inputs)
    with pytest.raises(InputError, match="training mode"):
        split(type(model)(model.config).train(), inputs)
    text = model.model.language_model
    refused("does not run on the example inputs|did not call get_image_features", text, inputs, image_token=60)


def test_masks_that_cannot_be_made_again():
    """Two samples that differ in which of their tokens attend both ways."""
    model, inputs = vlm("gemma3", 2)
    types = inputs["token_type_ids"].clone()
    types[1] = 0
    refused(
        "it is not causal with a window or chunks, padding and tokens",
        model,
        {**inputs, "token_type_ids": types},
        UnsupportedGraph,
    )


def test_padding_may_not_be_ruled_out_where_there_is_some():
    model, inputs = vlm("llava_left")
    refused("padded=False", model, inputs, padded=False)


@pytest.mark.parametrize("source", ["ids", "an input of its own"])
def test_a_decoder_that_is_given_more(source, monkeypatch):
    """As a mixture of experts that sends image tokens to experts of their own: embeddings and positions are not all."""
    model, inputs = vlm("llava")
    decoder = model.model.language_model
    forward, own = decoder.forward, model.model.forward
    types = (inputs["input_ids"] == 60).float() + 1

    def decode(*args, kinds=None, **more):
        out = forward(*args, **more)
        if kinds is not None:
            out.last_hidden_state = out.last_hidden_state + kinds[..., None]
        return out

    def call(input_ids=None, types=None, **more):
        if source == "ids" and input_ids is not None:
            types = (input_ids == 60).float() + 1
        return own(input_ids=input_ids, **more, **({} if types is None else {"kinds": types}))

    monkeypatch.setattr(decoder, "forward", decode)
    monkeypatch.setattr(model.model, "forward", call)
    if source != "ids":
        refused("off by .* from the model's own, which is given kinds too", model, inputs | {"types": types})
        return
    parts = split(model, inputs, all_logits=True)
    assert parts.takes_ids
    assert error(composed(parts, inputs)["logits"], run(model, **inputs).logits) < 1e-5


@pytest.mark.parametrize("kind", ["float", "a row of text before"])
def test_positions_of_other_forms(kind):
    model, inputs = vlm("qwen2_vl")
    positions = split(model, inputs).position_ids
    given = positions.float() if kind == "float" else torch.cat([torch.arange(positions.shape[-1]).expand(1, 1, -1), positions])
    parts = split(model, inputs | dict(position_ids=given))
    assert torch.equal(parts.position_ids, positions)
    assert parts.position_ids.dtype == torch.int64


def test_features_by_another_name(monkeypatch):
    model, inputs = vlm("llava")
    own = model.model.get_image_features

    def features(*args, **more):
        out = own(*args, **more)
        out.pooler_output = out.last_hidden_state = None
        return out

    monkeypatch.setattr(model.model, "get_image_features", features)
    refused("neither pooler_output nor last_hidden_state", model, inputs)
