"""Generation after reduced parts against the model's own layers run by hand over lists that grow, token by token."""

import copy
import dataclasses

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.models.family import noise
from tests.reference.dart import dart
from tests.vlm.by_hand import by_hand
from tests.vlm.models import FAMILIES, ids_with, parts_of, reduced_parts, vlm
from tokcompile import InputError, Tokens
from tokcompile.llm import Sampling
from tokcompile.llm.layout import layout
from tokcompile.llm.modules import Decode, Now
from tokcompile.llm.reach import Reach
from tokcompile.vlm import Generator, split
from tokcompile.vlm.kept import seen_by
from tokcompile.vlm.prompt import Prompt

COUNT, BEFORE, TEXT = 32, 5, 7
ENTRANCE = (("method", "divprune"), ("budget", Tokens(9)), ("where", (0,)))
LAYER = (("method", "dart"), ("budget", Tokens(9)), ("where", (2,)))
LAST = (("method", "fastv"), ("budget", Tokens(7)), ("where", (3,)))
GONE = (("method", "random"), ("budget", Tokens(0)), ("where", (2,)))
SHORTER = (("method", "divprune"), ("budget", 0.5), ("where", (2,)))
REDUCED_IN_VISION = ["llava", "qwen2_vl", "qwen3_vl", "paligemma"]
REARRANGED = [
    "qwen2_5_vl",
    "internvl",
    "gemma3",
    "mistral3",
    "llava_next_cut",
    "llava_onevision_cut",
]  # after the tower: windows, shuffles, pools, patch merging, tiles laid out as one map, of which padding is cut off


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
            left = {at[j] for j in out.kept[f"s{i}_index"][row].tolist()} if r.k else set()
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


CASES = [(name, LAYER) for name in FAMILIES]
CASES += [(name, ENTRANCE) for name in ("qwen3_vl", "gemma3")]
CASES += [(name, ENTRANCE) for name in ("llava", "qwen2_vl", "smolvlm")]
CASES += [("paligemma", LAST), ("qwen3_vl", LAST), ("gemma3", GONE), ("smolvlm", GONE)]


@pytest.mark.every(3)
@pytest.mark.parametrize(("name", "language"), CASES, ids=lambda v: v if isinstance(v, str) else dict(v)["method"])
def test_reduced_in_the_language_part(name, language, generator):
    made, _, gone = compare(name, generator, language)
    (r,) = made.text.prefill.plan.reductions
    assert len(gone[r.block]) == r.n - r.k
    lengths = [made.text.wiring.stage_of(layer).length for layer in range(4)]
    assert lengths == [r.n + BEFORE + TEXT] * r.block + [r.k + BEFORE + TEXT] * (4 - r.block)


BEHIND = [(name, LAYER) for name in REDUCED_IN_VISION] + [(name, ()) for name in ("llava", "qwen3_vl")]
BEHIND += [("qwen2_vl", ()), ("paligemma", ()), ("qwen3_vl", ENTRANCE)]
BEHIND += [(name, LAYER) for name in REARRANGED]


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "language"), BEHIND, ids=lambda v: v if isinstance(v, str) else dict(v).get("method", "whole")
)
def test_reduced_in_the_vision_part(name, language, generator):
    """What is left keeps its positions: the prompt is shorter, and the next position is that of the whole one."""
    language = tuple((k, Tokens(4) if k == "budget" else v) for k, v in language)
    made, hand, _ = compare(name, generator, language, SHORTER)
    assert f"; {made.parts.prompt.length} tokens are left after divprune" in repr(made.parts)
    left = made.parts.prompt.spans[0][1] - BEFORE
    assert left < hand.positions.shape[1] - BEFORE - TEXT
    assert made.text.wiring.length == BEFORE + left + made.parts.prompt.room[-1]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "llava_next"])
def test_each_sample_keeps_its_own(name, generator):
    few = tuple((k, Tokens(4) if k == "budget" else v) for k, v in LAYER)
    made, _, _ = compare(name, generator, few, SHORTER, batch=2)
    inputs = vlm(name, 2)[1]
    first, second = (what_is_left(made, inputs, row)[0] for row in range(2))
    assert first != second


@pytest.mark.every(3)
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


def test_fewer_tokens_than_pivots(generator):
    """DART keeps 3 tokens with 4 pivots: its pivots are as many as fit."""
    made, _, gone = compare("llava", generator, (("method", "dart"), ("budget", Tokens(3)), ("where", (2,))))
    assert len(gone[2]) == 49 - 3
    assert made.text.wiring.stages[1].length == BEFORE + 3 + TEXT


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava_onevision", "dart"),
        ("llava_onevision", "hiprune"),
        ("llava_onevision", "dart_embeds"),
        ("gemma3", "dart"),
    ],
)
def test_padding_is_never_chosen_by_nor_seen(name, method):
    """With room for more text, padded on the left of each, the same tokens are kept as without, and generation goes on alike.

    The keys of LLaVA-OneVision's decoder have a bias, so that those of padding are not small by themselves.
    """
    _, inputs = vlm(name)
    options = dict(method=method, budget=Tokens(8), outputs="reduced")
    found = []
    for room in (None, (BEFORE + 3, TEXT + 4)):
        parts = parts_of(name, room=room)
        texts = parts.prompt.texts_of(inputs["input_ids"][0].tolist())
        ids, mask = parts.prompt.lay_out(texts, padded=True)
        prefill = tokcompile.optimize(*parts.language, spans=parts.spans, **options)
        kept = run(prefill, **parts.language_inputs(ids, parts.see(inputs["pixel_values"]), mask)).kept["s0_index"]
        made = Generator(parts, prefill, max_new_tokens=8)(inputs["pixel_values"], ids, mask, eos=(), keep_logits=True)
        found.append((kept, made))
    (kept, want), (same, got) = found
    assert kept.tolist() == same.tolist()
    assert got.tokens.tolist() == want.tokens.tolist()
    assert error(got.logits, want.logits) < 1e-4


def test_a_prompt_shorter_than_the_text_pivots():
    _, inputs = vlm("llava")
    parts = parts_of("llava", room=(5, 9))
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, method="dart", budget=Tokens(8), outputs="reduced")
    made = Generator(parts, prefill, max_new_tokens=2)
    with pytest.raises(InputError, match="dart reads 4 tokens of the text after the image, and this prompt has 2"):
        made(inputs["pixel_values"], *parts.prompt.lay_out([[1], [2, 3]], padded=True))


def test_a_method_that_would_let_padding_rate_the_image():
    parts = parts_of("llava", padded=True)
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, method="sparsevlm", budget=Tokens(8), outputs="reduced")
    with pytest.raises(InputError, match="sparsevlm reads all tokens of the text, and this language part takes padding"):
        Generator(parts, prefill, max_new_tokens=2)


def test_padding_that_the_parts_do_not_take():
    _, inputs = vlm("llava")
    parts = parts_of("llava")
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 0] = 0
    with pytest.raises(InputError, match="takes no padding, and attention_mask hides some tokens"):
        parts(inputs["pixel_values"], inputs["input_ids"], mask)


def test_single_tokens_of_a_merge_unit():
    """Four patches become one token of the prompt; a plan that drops single patches cannot say which tokens are left."""
    parts = parts_of("qwen2_vl")
    whole = tokcompile.optimize(*parts.vision, method="divprune", where=[2], budget=0.5, outputs="reduced")
    (r,) = whole.plan.reductions
    assert (r.n, r.k, r.unit) == (12, 6, 4)
    single = whole.plan.replace(reductions=(dataclasses.replace(r, n=48, k=24, unit=1),))
    with pytest.raises(tokcompile.TokcompileError):
        parts.after(tokcompile.optimize(*parts.vision, plan=single, outputs="reduced"))


def test_merged_tokens_that_weigh_more():
    _, inputs = vlm("llava")
    parts = parts_of("llava")
    options = dict(method="tome", budget=Tokens(30), where=[2], spans=parts.spans, outputs="reduced")
    with pytest.raises(InputError, match="tome lets a merged token weigh as much as the tokens in it"):
        Generator(parts, tokcompile.optimize(*parts.language, **options), max_new_tokens=4)
    plain = tokcompile.optimize(*parts.language, **options, proportional=False)
    made = Generator(parts, plain, max_new_tokens=4)(inputs["pixel_values"], inputs["input_ids"], eos=())
    assert made.tokens.shape == (1, 4)


def test_windows_and_positions_of_several_axes():
    """A position of three numbers does not say how far away a token is."""
    model, _ = vlm("qwen2_vl")
    parts = parts_of("qwen2_vl")
    prefill = tokcompile.optimize(
        *parts.language, spans=parts.spans, outputs="reduced", **dict(ENTRANCE, where=(2,), budget=Tokens(8))
    )
    made = Generator(parts, prefill, max_new_tokens=2)
    step, kept = Decode(model, layout(prefill, 2)), {"s0_index": torch.arange(8)[None]}
    said = "a position has 3 numbers in this model, and its sliding windows or chunks count in one"
    with pytest.raises(InputError, match=said):
        step.visible(1, Reach(4), Now(torch.zeros(1, 1), torch.zeros(3, 1, 1), torch.tensor([0]), kept, None, None))
    assert made.text.wiring.placed is False


def test_positions_without_gaps():
    """As the model itself on the embeddings of a shorter prompt; padding changes nothing."""
    model, inputs = vlm("llava")
    parts = parts_of("llava")
    vision = reduced_parts("llava", **dict(SHORTER)).optimized
    made = []
    for room in (None, (BEFORE + 3, TEXT + 4)):
        behind = parts_of("llava", room=room).after(vision, renumber=True)
        whole = tokcompile.optimize(*behind.language, spans=behind.spans, outputs="reduced", method="random", budget=1.0)
        ids = inputs["input_ids"][0].tolist()
        prompt = behind.prompt.lay_out([ids[:BEFORE], ids[-TEXT:]], padded=room is not None)
        made.append(Generator(behind, whole, max_new_tokens=8)(inputs["pixel_values"], *prompt, eos=()).tokens.tolist())
    behind = parts.after(vision, renumber=True)
    embeds = behind.language_inputs(inputs["input_ids"], behind.see(inputs["pixel_values"]))["inputs_embeds"]
    want = run(
        model.generate, inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=8, min_new_tokens=8,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert made == [want.tolist(), want.tolist()]
    again = Prompt.from_data(behind.prompt.data())  # as in generate.json
    assert torch.equal(again.placed(parts.position_ids, None), behind.language.kwargs["position_ids"])
    parts = parts_of("qwen2_vl")
    with pytest.raises(InputError, match=r"(?s)renumber=True.*rows and columns.*leave renumber out"):
        parts.after(tokcompile.optimize(*parts.vision, outputs="reduced", **dict(SHORTER)), renumber=True)


def test_tiles_that_are_shrunk_are_given_back():
    """The tower drops tokens inside; the prompt loses those of the base view alone, since neighbours on the map are mixed."""
    model, inputs = vlm("llava_onevision")
    model = copy.deepcopy(model)
    model.config.vision_aspect_ratio = "anyres_max_1"  # as many tokens as one tile, for two
    model.config.image_grid_pinpoints = [[56, 112]]
    images = dict(pixel_values=noise(1, 3, 3, 56, 56), image_sizes=torch.tensor([[56, 112]]))
    features = run(model.get_image_features, **images, vision_aspect_ratio="anyres_max_1").pooler_output
    inputs = inputs | images | ids_with(1, (sum(map(len, features)),))
    assert sum(map(len, features)) < 3 * 49
    parts = split(model, inputs)
    options = dict(method="divprune", where=[2], budget=0.5)
    fewer = tokcompile.optimize(*parts.vision, outputs="reduced", **options)
    seen = parts.after(fewer).see(inputs["pixel_values"])
    base = run(fewer, *parts.vision.args).kept["s0_0_index"][0].tolist()
    assert len(base) == 25
    assert seen["kept"].tolist() == [base + list(range(49, sum(map(len, features))))]
    with pytest.raises(InputError, match="outputs='keep', which gives dropped tokens back"):
        seen_by(parts.prompt, run(fewer, *parts.vision.args).output, {}, {})
    whole = parts.after(tokcompile.optimize(*parts.vision, outputs="keep", **options))
    assert whole.spans == parts.spans
    assert whole(inputs["pixel_values"], inputs["input_ids"])["logits"].shape == (1, 1, 64)
