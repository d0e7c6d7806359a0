"""Models that do not run on embeddings alone, around a causal language model that does, as BLIP-2."""

import functools

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
    """(model, inputs): eight queries look at an image; their features are the image's tokens."""
    with seeded():
        config = class_of(f"{name}Config")(
            vision_config=TOWER, qformer_config=QUERIES, text_config=OPT, num_query_tokens=8, image_token_index=60
        )
        model = shake(class_of(f"{name}ForConditionalGeneration")(config).eval())
    ids = torch.cat([torch.full((1, 8), 60), tokens(1, 5, 59)], 1)
    inputs = dict(pixel_values=noise(1, 3, 32, 32), input_ids=ids, attention_mask=torch.ones_like(ids))
    return model, inputs | ({"qformer_input_ids": ids[:, 8:]} if name == "InstructBlip" else {})


def test_the_language_model_inside_generates(tmp_path):
    model, inputs = blip("Blip2")
    parts = split(model, inputs)
    assert (parts.causal, parts.spans) == ("language_model", [SPAN])
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    assert error(parts(pixels, ids)["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    made = Generator(parts, prefill, max_new_tokens=COUNT)(pixels, ids, eos=())
    want = run(model.generate, **inputs, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, -COUNT:])
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    gone = dropped(run(prefill, **parts.language.kwargs).kept["s0_index"][0], *SPAN)
    generator = Generator(parts, prefill, max_new_tokens=COUNT)
    made = generator(pixels, ids, eos=(), keep_logits=True)
    with hidden(gone, {2, 3}):
        want = run(parts.language.module, **parts.language.kwargs)["logits"][:, -1]
    assert error(made.logits[0], want) < 1e-5
    export(parts, prefill, tmp_path / "folder", max_new_tokens=COUNT)
    assert load(tmp_path / "folder")(pixels, ids, eos=()).tokens.tolist() == made.tokens.tolist()


def test_the_tower_behind_the_queries_is_reduced():
    model, inputs = blip("Blip2")
    vision = tokcompile.optimize(*split(model, inputs).vision, method="tome", budget=0.5, outputs="reduced")
    assert vision.plan.reductions[0].n == 16
    assert split(model, inputs).after(vision).prompt.length == inputs["input_ids"].shape[1]


def test_features_that_depend_on_the_question_are_refused():
    with pytest.raises(InputError, match="looks at an image with the question in mind"):
        split(*blip("InstructBlip"))
