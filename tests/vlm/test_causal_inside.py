"""Models that do not run on embeddings alone, around a causal language model that does, as BLIP-2; and ones that look at an
image with the question in mind, as InstructBLIP."""

import functools

import numpy
import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import noise, seeded, tokens
from tests.models.hf_base import class_of
from tokcompile import InputError
from tokcompile.vlm import Generator, export, load, split

COUNT, SPAN = 6, (0, 8)
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
QUERIES = dict(
    vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, encoder_hidden_size=64
)
OPT = dict(
    model_type="opt", vocab_size=64, hidden_size=48, num_hidden_layers=4, ffn_dim=96, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=48,
)  # fmt: skip


@functools.cache
def blip(name):
    """(model, inputs): eight queries look at an image, or each of two frames; their features are its tokens. A question is as
    long as the prompt."""
    with seeded():
        config = class_of(f"{name}Config")(
            vision_config=TOWER, qformer_config=QUERIES, text_config=OPT, num_query_tokens=8, image_token_index=60,
            video_token_index=60,
        )  # fmt: skip
        model = shake(class_of(f"{name}ForConditionalGeneration")(config).eval())
    frames = 2 if name.endswith("Video") else 1
    ids = torch.cat([torch.full((1, 8 * frames), 60), tokens(1, 5, 59)], 1)
    pixels = noise(1, 2, 3, 32, 32) if frames > 1 else noise(1, 3, 32, 32)
    inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    return model, inputs | ({"qformer_input_ids": tokens(1, ids.shape[1], 59)} if name != "Blip2" else {})


@pytest.mark.parametrize(("name", "count", "further"), [
    ("Blip2", 8, []), ("InstructBlip", 8, ["qformer_input_ids"]), ("InstructBlipVideo", 16, ["qformer_input_ids"]),
])  # fmt: skip
def test_features_are_made_of_the_question_too(name, count, further):
    model, inputs = blip(name)
    parts = split(model, inputs)
    assert (parts.causal, parts.spans, parts.further) == ("language_model", [(0, count)], further)
    inputs = inputs | {key: (inputs[key] * 7) % 59 for key in further}
    got = parts(inputs["pixel_values"], inputs["input_ids"], **{key: inputs[key] for key in further})
    assert error(got["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5


def test_a_question_that_is_changed_on_its_way_is_refused(monkeypatch):
    model, inputs = blip("InstructBlip")
    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda qformer_input_ids, **more: own(qformer_input_ids=qformer_input_ids + 1, **more)
    )
    with pytest.raises(InputError, match="qformer_input_ids changes the features of the image, and get_image_features is not"):
        split(model, inputs)


def test_the_language_model_inside_generates():
    model, inputs = blip("InstructBlip")
    parts = split(model, inputs)
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    inputs = inputs | {key: (inputs[key] * 7) % 59 for key in parts.further}  # another question
    more = {key: inputs[key] for key in parts.further}
    assert error(parts(pixels, ids, **more)["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    made = Generator(parts, prefill, max_new_tokens=COUNT)(pixels, ids, eos=(), **more)
    want = run(model.generate, **inputs, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, -COUNT:])
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    gone = dropped(run(prefill, **parts.language.kwargs).kept["s0_index"][0], *SPAN)
    generator = Generator(parts, prefill, max_new_tokens=COUNT)
    made = generator(pixels, ids, eos=(), keep_logits=True, **more)
    prompt = parts.language_inputs(ids, parts.see(pixels, **more))
    with hidden(gone, {2, 3}):
        want = run(parts.language.module, **prompt)["logits"][:, -1]
    assert error(made.logits[0], want) < 1e-5


@pytest.mark.matrix
def test_the_tower_behind_the_queries_is_reduced_in_a_folder_that_takes_a_question(tmp_path):
    model, inputs = blip("InstructBlip")
    parts = split(model, inputs)
    vision = tokcompile.optimize(*parts.vision, method="tome", budget=0.5, outputs="reduced")
    assert vision.plan.reductions[0].n == 16
    parts = parts.after(vision)
    assert parts.prompt.length == inputs["input_ids"].shape[1]
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    export(parts, prefill, tmp_path / "folder", max_new_tokens=COUNT)
    folder, ids = load(tmp_path / "folder"), inputs["input_ids"]
    inputs = inputs | {key: (inputs[key] * 7) % 59 for key in parts.further}
    numpy.savez(tmp_path / "all.npz", **{n: v.numpy() for n, v in inputs.items()})
    seen = folder.arrays(tmp_path / "all.npz")
    assert {n: v.shape for n, v in seen.items()} == {n: inputs[n].shape for n in ("pixel_values", "qformer_input_ids")}
    want = Generator(parts, prefill, max_new_tokens=COUNT)(input_ids=ids, eos=(), **seen).tokens
    assert folder(input_ids=ids, eos=(), **seen).tokens.tolist() == want.tolist()
    for takes in (folder, parts):
        with pytest.raises(InputError, match="the vision part takes qformer_input_ids beside the pixels"):
            takes(inputs["pixel_values"], ids)
    with pytest.raises(InputError, match=r"qformer_input_ids is \(1, 4\) of torch.int64, and the vision part takes \(1, 13\)"):
        folder(input_ids=ids, **seen | {"qformer_input_ids": ids[:, :4]})
