"""Generation after reduced parts against the model's own layers run by hand over lists that grow, token by token."""

import pytest
import torch

from tests.conftest import error, run
from tests.reference.dart import dart
from tests.vlm.by_hand import by_hand
from tests.vlm.models import FAMILIES, vlm
from tokcompile import Tokens
from tokcompile.llm import Sampling

COUNT, BEFORE, TEXT = 32, 5, 7
ENTRANCE = (("method", "divprune"), ("budget", Tokens(9)), ("where", (0,)))
LAYER = (("method", "dart"), ("budget", Tokens(9)), ("where", (2,)))
LAST = (("method", "fastv"), ("budget", Tokens(7)), ("where", (3,)))
SHORTER = (("method", "divprune"), ("budget", 0.5), ("where", (2,)))
REDUCED_IN_VISION = ["llava", "qwen2_vl", "qwen3_vl", "paligemma"]


def positions_of(inputs, name, row):
    """(axes, L) and the next position, from what each family documents."""
    length = inputs["input_ids"].shape[1]
    if "image_grid_thw" not in inputs:
        first = 1 if name == "paligemma" else 0
        return torch.arange(first, first + length)[None], first + length
    t, h, w = (int(v) for v in inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2]))
    assert t == 1
    image = torch.stack([torch.full((h, w), 0), torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)]).flatten(1)
    text = torch.arange(TEXT) + BEFORE + max(h, w)
    whole = torch.cat([torch.arange(BEFORE).expand(3, -1), image + BEFORE, text.expand(3, -1)], 1)
    return whole, int(whole.max()) + 1


def what_is_left(made, inputs, row):
    """Indices in the full prompt that are gone, by layer, and what the vision part gave, from the programs' own indices."""
    parts = made.parts
    seen = parts.see(inputs["pixel_values"])
    places = (inputs["input_ids"][row] == 60).nonzero()[:, 0].tolist()
    at = places if "kept" not in seen else [places[i] for i in seen["kept"][row].tolist()]
    gone = {0: set(places) - set(at)}
    prefill = made.text.prefill
    if prefill.plan.reductions:
        out = run(prefill, **parts.language_inputs(inputs["input_ids"], seen))
        for i, r in enumerate(prefill.plan.reductions):
            left = {at[j] for j in out.kept[f"s{i}_index"][row].tolist()}
            gone[r.block] = gone.get(r.block, set()) | set(at) - left
    return gone, at, seen


def compare(name, generator, language=(), vision=(), batch=1):
    model, inputs, made = generator(name, language, vision, batch)
    got = made(inputs["pixel_values"], inputs["input_ids"], eos=(), keep_logits=True)
    drawn = made(inputs["pixel_values"], inputs["input_ids"], eos=(), keep_logits=True, sampling=Sampling(2.0, seed=0))
    for row in range(batch):
        gone, at, seen = what_is_left(made, inputs, row)
        positions, after = positions_of(inputs, name, row)
        mine = {}
        if vision:
            mine = dict(features=seen["features"][row], deepstack=[one[row] for one in seen.get("deepstack", ())], at=at)
        hand, embeds = by_hand(name, model, inputs, row, positions, after, dropped=gone, **mine)
        want, logits = hand.generate(embeds, COUNT)
        assert got.tokens[row].tolist() == want
        assert error([one[row] for one in got.logits], [one[0] for one in logits]) < 1e-4
        # drawn tokens vary where the likeliest ones repeat; what was dropped is hidden by masks, at its layer and after
        assert len(set(drawn.tokens[row].tolist())) > 10
        masked, embeds = by_hand(name, model, inputs, row, positions, after, dropped=gone, hide=True, **mine)
        _, hidden = masked.generate(embeds, COUNT, drawn.tokens[row])
        assert error([one[row] for one in drawn.logits], [one[0] for one in hidden]) < 1e-4
    return made, hand, gone


CASES = [(name, language) for language in (ENTRANCE, LAYER) for name in FAMILIES]
CASES += [(name, LAST) for name in ("qwen3_vl", "paligemma", "gemma3", "smolvlm")]


@pytest.mark.parametrize(("name", "language"), CASES, ids=lambda v: v if isinstance(v, str) else dict(v)["method"])
def test_reduced_in_the_language_part(name, language, generator):
    made, _, gone = compare(name, generator, language)
    (r,) = made.text.prefill.plan.reductions
    assert len(gone[r.block]) == r.n - r.k
    lengths = [made.text.wiring.stage_of(layer).length for layer in range(4)]
    assert lengths == [r.n + BEFORE + TEXT] * r.block + [r.k + BEFORE + TEXT] * (4 - r.block)


@pytest.mark.parametrize("language", [(), ENTRANCE, LAYER], ids=["whole", "entrance", "layer"])
@pytest.mark.parametrize("name", REDUCED_IN_VISION)
def test_reduced_in_the_vision_part(name, language, generator):
    """What is left keeps its positions: the prompt is shorter, and the next position is that of the whole one."""
    language = tuple((k, Tokens(4) if k == "budget" else v) for k, v in language)
    made, hand, _ = compare(name, generator, language, SHORTER)
    left = made.parts.prompt.spans[0][1] - BEFORE
    assert left < hand.positions.shape[1] - BEFORE - TEXT
    assert made.text.wiring.length == BEFORE + left + TEXT


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_each_sample_keeps_its_own(name, generator):
    few = tuple((k, Tokens(4) if k == "budget" else v) for k, v in LAYER)
    made, _, _ = compare(name, generator, few, SHORTER if name != "gemma3" else (), batch=2)
    inputs = vlm(name, 2)[1]
    first, second = (what_is_left(made, inputs, row)[0] for row in range(2))
    assert first != second


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_reduction_it_is_the_models_own_generation(name, generator):
    model, inputs, made = generator(name)
    length = inputs["input_ids"].shape[1]
    want = run(
        model.generate, **{**inputs, "use_cache": True}, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert made(inputs["pixel_values"], inputs["input_ids"], eos=()).tokens.tolist() == want[:, length:].tolist()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_dart_inside_of_a_model_with_positions_of_three_axes(name, generator):
    """The reference of the method on the keys, after their rotation, and states that the hand-run layers have."""
    _, hand, gone = compare(name, generator, LAYER)
    n = len(hand.there[1]) - BEFORE - TEXT
    kept = dart(
        hand.lists.keys[1][0][0].numpy(), hand.base.norm(hand.leaving[1])[0].numpy(), 9, 4, start=BEFORE, n=n, text_pivots=4
    )
    assert set(range(BEFORE, BEFORE + n)) - {BEFORE + int(i) for i in kept} == gone[2]
