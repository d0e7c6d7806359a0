"""Layers that attend within chunks of positions (Llama 4), after tokens were dropped, across two edges between chunks."""

import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.vlm.models import parts_of, vlm
from tokcompile.llm.reach import Reach
from tokcompile.vlm import Generator, export, load

COUNT, LENGTH = 12, 24
CHUNK = Reach(16, chunked=True)


def generator(parts, **options):
    prefill = tokcompile.optimize(*parts.language, method="random", spans=parts.spans, outputs="reduced", **options)
    return Generator(parts, prefill, max_new_tokens=COUNT)


def test_without_a_reduction_it_is_the_models_own_generation():
    model, inputs = vlm("llama4", 2)
    parts = parts_of("llama4", 2)
    assert parts.view.reaches == (CHUNK, CHUNK, CHUNK, None)
    made = generator(parts, budget=1.0)(inputs["pixel_values"], inputs["input_ids"], eos=())
    given = {name: value for name, value in inputs.items() if name != "use_cache"}
    want = run(model.generate, **given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, LENGTH:])


def test_chunks_are_counted_in_original_positions(tmp_path):
    model, inputs = vlm("llama4")
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    parts = parts_of("llama4")
    made = generator(parts, budget=tokcompile.Tokens(5), where=[1])
    gone = dropped(run(made.text.prefill, **parts.language.kwargs).kept["s0_index"][0], *parts.spans[0])
    got = made(pixels, ids, eos=(), keep_logits=True)
    table = model.get_input_embeddings()
    for step, logits in enumerate(got.logits):
        embeds = torch.cat([parts.language.kwargs["inputs_embeds"], run(table, got.tokens[:, :step])], 1)
        with hidden(gone, {1, 2, 3}):
            want = run(model, inputs_embeds=embeds, use_cache=False).logits[:, -1]
        assert error(logits, want) < 1e-5
    export(parts, made.text.prefill, tmp_path / "folder", max_new_tokens=COUNT)
    assert load(tmp_path / "folder")(pixels, ids, eos=()).tokens.tolist() == got.tokens.tolist()


def test_padding_has_no_position():
    """Chunks begin at the first token of the text, whatever stands before it."""
    _, inputs = vlm("llama4")
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    want = generator(parts_of("llama4"), budget=1.0)(pixels, ids, eos=()).tokens
    parts = parts_of("llama4", room=(9, 6))
    assert parts.prompt.length == LENGTH + 7
    ids, mask = parts.prompt.lay_out(parts.prompt.texts_of(ids[0].tolist()), True)
    assert torch.equal(generator(parts, budget=1.0)(pixels, ids, mask, eos=()).tokens, want)
