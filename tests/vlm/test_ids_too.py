"""Models that make more of the ids than embeddings, here inputs of single layers: their language part takes ids too."""

from dataclasses import replace

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.vlm.models import parts_of, vlm
from tokcompile.vlm import export, load

COUNT = 6


def test_without_a_reduction_it_is_the_models_own_generation(generator):
    model, inputs, made = generator("gemma4", batch=2)
    assert made.parts.takes_ids
    assert set(made.parts.language.kwargs) == {"inputs_embeds", "position_ids", "input_ids"}
    made = made(inputs["pixel_values"], inputs["input_ids"], eos=(), max_new_tokens=COUNT)
    given = {name: value for name, value in inputs.items() if name != "use_cache"}
    want = run(model.generate, **given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, -COUNT:])


@pytest.mark.matrix
def test_equals_keys_that_nobody_sees_and_the_folder_does_too(generator, tmp_path):
    _, inputs, reduced = generator("gemma4", (("method", "random"), ("budget", tokcompile.Tokens(4)), ("where", (1,))))
    parts, prefill = reduced.parts, reduced.text.prefill
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    seen = parts.see(pixels)
    gone = dropped(run(prefill, **parts.language_inputs(ids, seen)).kept["s0_index"][0], *parts.spans[0])
    made = reduced(pixels, ids, eos=(), keep_logits=True, max_new_tokens=COUNT)
    with hidden(gone, {1, 3}):  # those that attend to keys of layer 1 or later
        want = run(parts.language.module, **parts.language.kwargs)["logits"][:, -1]
    assert error(made.logits[0], want) < 1e-5
    export(parts, prefill, tmp_path / "folder", max_new_tokens=COUNT)
    assert load(tmp_path / "folder")(pixels, ids, eos=()).tokens.tolist() == made.tokens.tolist()


def test_behind_a_vision_part_that_gives_fewer_features():
    """Placeholders of features that are gone are left out of the ids."""
    _, inputs = vlm("gemma4")
    parts, ids = parts_of("gemma4"), inputs["input_ids"]
    (start, stop), kept = parts.spans[0], torch.tensor([[1, 2, 5, 7, 10]])
    seen = {"features": parts.see(inputs["pixel_values"])["features"][:, kept[0]], "kept": kept}
    prompt = parts.prompt.shortened(kept)
    view = parts.view.shortened(parts.prompt.spans, prompt.rows(None)[0].tolist())
    vision = tokcompile.optimize(*parts.vision, budget=1.0, outputs="reduced")  # stands for one that gives these five
    short = replace(parts, optimized=vision, prompt=prompt, view=view).with_language(ids, seen, None, ids_too=True)
    gone = dropped(kept[0], start, stop)
    rows = [p for p in range(ids.shape[1]) if p not in gone]
    assert torch.equal(short.language.kwargs["input_ids"], ids[:, rows])
    made = run(short.language.module, **short.language.kwargs)["logits"][:, -1]
    with hidden(gone, range(4)):
        want = run(parts.language.module, **parts.language.kwargs)["logits"][:, -1]
    assert error(made, want) < 1e-5
