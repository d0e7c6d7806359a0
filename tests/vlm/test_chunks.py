"""Layers that attend within chunks of positions (Llama 4), after tokens were dropped, across two edges between chunks."""

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.vlm.models import parts_of
from tokcompile.llm.reach import Reach
from tokcompile.vlm import Generator, export, load

COUNT, LENGTH = 12, 24
CHUNK = Reach(16, chunked=True)


def test_without_a_reduction_it_is_the_models_own_generation(generator):
    model, inputs, made = generator("llama4", batch=2)
    assert made.parts.view.reaches == (CHUNK, CHUNK, CHUNK, None)
    made = made(inputs["pixel_values"], inputs["input_ids"], eos=(), max_new_tokens=COUNT)
    given = {name: value for name, value in inputs.items() if name != "use_cache"}
    want = run(model.generate, **given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, LENGTH:])


@pytest.mark.matrix
def test_chunks_are_counted_in_original_positions(generator, tmp_path):
    model, inputs, made = generator("llama4", (("method", "random"), ("budget", tokcompile.Tokens(5)), ("where", (1,))))
    pixels, ids, parts = inputs["pixel_values"], inputs["input_ids"], made.parts
    gone = dropped(run(made.text.prefill, **parts.language.kwargs).kept["s0_index"][0], *parts.spans[0])
    got = made(pixels, ids, eos=(), keep_logits=True, max_new_tokens=COUNT)
    table = model.get_input_embeddings()
    for step, logits in enumerate(got.logits):
        embeds = torch.cat([parts.language.kwargs["inputs_embeds"], run(table, got.tokens[:, :step])], 1)
        with hidden(gone, {1, 2, 3}):
            want = run(model, inputs_embeds=embeds, use_cache=False).logits[:, -1]
        assert error(logits, want) < 1e-5
    export(parts, made.text.prefill, tmp_path / "folder", max_new_tokens=COUNT)
    assert load(tmp_path / "folder")(pixels, ids, eos=()).tokens.tolist() == got.tokens.tolist()


def test_padding_has_no_position(generator):
    """Chunks begin at the first token of the text, whatever stands before it."""
    _, inputs, made = generator("llama4")
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    want = made(pixels, ids, eos=(), max_new_tokens=COUNT).tokens
    parts = parts_of("llama4", room=(9, 6))
    assert parts.prompt.length == LENGTH + 7
    ids, mask = parts.prompt.lay_out(parts.prompt.texts_of(ids[0].tolist()), True)
    prefill = tokcompile.optimize(*parts.language, method="random", budget=1.0, spans=parts.spans, outputs="reduced")
    assert torch.equal(Generator(parts, prefill, max_new_tokens=COUNT)(pixels, ids, mask, eos=()).tokens, want)
