"""Image features written at placeholders: a concatenation in the graph, spans for the plan, a guard for later calls."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import counts, error, layer, leaves, run
from tests.models.family import noise, tokens
from tests.passes.graphs import canonical, ops
from tests.tiny import LENGTH, WIDTH, Block
from tokcompile import Tokens
from tokcompile.passes.canonicalise import FIXED
from tokcompile.passes.placeholders import SPANS, runs

IDS = torch.tensor([[1, 9, 9, 9, 2, 9, 9, 3], [4, 9, 9, 9, 5, 9, 9, 6]])
TEXT, FEATURES = torch.randn(2, 8, 6), torch.randn(10, 6)


def scatter(ids, text, features):
    return text.masked_scatter((ids == 9).unsqueeze(-1).expand_as(text), features)


def some_channels(ids, text, features):
    return text.masked_scatter(ids.unsqueeze(-1) > torch.arange(6), text * 2)


def spans(gm):
    return [n.meta[SPANS] for n in gm.graph.nodes if SPANS in n.meta]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_masked_scatter_becomes_a_concatenation(rows):
    inputs = IDS[:rows], TEXT[:rows], FEATURES[: 5 * rows]
    gm = canonical(scatter, *inputs)
    assert "masked_scatter.default" not in ops(gm)
    assert spans(gm) == [((1, 4), (5, 7))]
    assert torch.equal(gm(*inputs)[0], scatter(*inputs))
    assert [f.guard for f in gm.meta[FIXED]] == ["the prompt holds image features at positions 1 to 4, 5 to 7"]


def test_positions_named_by_constants_are_joined_and_taken():
    rows, places = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2, 3, 4, 2, 3, 4])

    def deep_stack(text, features):
        text = text.clone()
        text[rows, places] = text[rows, places] + features
        return text

    inputs = TEXT, FEATURES[:6]
    gm = canonical(deep_stack, *inputs)
    assert spans(gm) == [((2, 5),)]
    assert not {"index.Tensor", "index_put.default"} & set(ops(gm))
    assert torch.equal(gm(*inputs)[0], deep_stack(*inputs))
    assert not gm.meta[FIXED]  # constants do not change from call to call


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_of_two_kinds_go_through_layers_of_their_own(rows):
    there = (IDS[:1] == 9)[..., None].expand(rows, -1, 6)

    def experts(text):
        made = torch.zeros_like(text)
        made[~there] = (text[~there].view(-1, 6) * 2).flatten()
        made[there] = text[there].view(-1, 6).cumsum(1).flatten()
        return made + text

    gm = canonical(experts, TEXT[:rows])
    assert not spans(gm)  # not even where the layers for images wrote: what is upstream is no tower
    assert not {"index.Tensor", "index_put.default"} & set(ops(gm))
    assert torch.equal(gm(TEXT[:rows])[0], experts(TEXT[:rows]))


def test_some_channels_named_one_by_one_stay_what_they_are():
    there = ((IDS[:1] == 9)[..., None] & (torch.arange(6) < 5)).expand(1, -1, 6)

    def write(text):
        text = text.clone()
        text[there] = text[there] * 2
        return text

    gm = canonical(write, TEXT[:1])
    assert "index_put.default" in ops(gm)
    assert torch.equal(gm(TEXT[:1])[0], write(TEXT[:1]))


def test_what_is_laid_out_around_weights_is_no_prompt():
    """A class token in front of patches, by an index."""
    places, tokens = torch.arange(1, 6), torch.zeros(1, 6, 6)

    def laid_out(features):
        x = tokens.clone()
        x[torch.zeros(5, dtype=torch.int64), places] = features
        return x * 2

    gm = canonical(laid_out, FEATURES[:5])
    assert "index_put.default" not in ops(gm)
    assert not spans(gm)
    assert torch.equal(gm(FEATURES[:5])[0], laid_out(FEATURES[:5]))


@pytest.mark.parametrize(("shift", "cast"), [(0, False), (0, True), (1, False)])
def test_features_taken_by_their_rank(shift, cast):
    """Every feature once and in order; in another order it is no placeholder."""

    def place(ids, text, features):
        there = ids == 9
        index = ((there.cumsum(-1) - 1).clamp(min=0) + shift) % 5
        taken = features.gather(1, index[..., None].expand(-1, -1, 6))
        return torch.where(there[..., None], taken.half().float() if cast else taken, text)

    features = FEATURES.reshape(2, 5, 6).to(torch.float64 if cast else torch.float32)
    gm = canonical(place, IDS, TEXT, features)
    assert spans(gm) == ([] if shift else [((1, 4), (5, 7))])
    assert ("gather.default" in ops(gm)) == bool(shift)
    assert torch.equal(gm(IDS, TEXT, features)[0], place(IDS, TEXT, features))
    assert len(gm.meta[FIXED]) == (0 if shift else 2)


def test_one_wide_row_of_features_is_no_row_for_each_place():
    def place(ids, text, features):
        taken = features.gather(1, (ids * 0)[..., None].expand(-1, -1, 6))
        return torch.where((ids == 9)[..., None], taken, text)

    features = FEATURES.reshape(2, 1, 30)
    gm = canonical(place, IDS, TEXT, features)
    assert not spans(gm)
    assert torch.equal(gm(IDS, TEXT, features)[0], place(IDS, TEXT, features))


def test_a_feature_for_one_place_is_no_row_of_the_models_own():
    def write(ids, text, features):
        text = text.clone()
        text[ids == 2] = features
        return text

    inputs = IDS[:1], TEXT[:1], FEATURES[:1]
    gm = canonical(write, *inputs)
    assert spans(gm) == [((4, 5),)]
    assert torch.equal(gm(*inputs)[0], write(*inputs))


@pytest.mark.parametrize("row", [torch.arange(6.0), torch.ones(1, 6), torch.tensor(2.0)], ids=["row", "1 row", "number"])
def test_one_row_written_at_a_mask_is_a_choice(row):
    def write(ids, text):
        text = text.clone()
        text[ids == 9] = row
        return text

    gm = canonical(write, IDS, TEXT)
    assert not {"index_put.default", "nonzero.default"} & set(ops(gm))
    assert torch.equal(gm(IDS, TEXT)[0], write(IDS, TEXT))


@pytest.mark.parametrize("case", ["rows differ", "features left over", "channels differ"])
def test_other_writes_stay_what_they_are(case):
    ids, features, fn = IDS.clone(), FEATURES, scatter
    if case == "rows differ":
        ids[1] = ids[1].roll(1)
    elif case == "features left over":
        features = torch.randn(11, 6)
    else:
        fn = some_channels
    gm = canonical(fn, ids, TEXT, features)
    assert "masked_scatter.default" in ops(gm)
    assert not spans(gm)
    assert torch.equal(gm(ids, TEXT, features)[0], fn(ids, TEXT, features))


@pytest.mark.parametrize("row", [[], [True], [False] * 3, [True, False, True, True], [False, True, True, False]])
def test_runs(row):
    found = runs(torch.tensor(row, dtype=torch.bool))
    assert [i for a, b in found for i in range(a, b)] == [i for i, r in enumerate(row) if r]
    assert all(b1 < a2 for (_, b1), (a2, _) in zip(found, found[1:]))


@pytest.mark.parametrize("name", ["hf/llava", "hf/paligemma"])
def test_fewer_image_tokens_make_a_shorter_prompt(name, family, program):
    fast = tokcompile.optimize(program(name), method="random", budget=Tokens(20), where=[1], outputs="reduced")
    out, kept = run(fast, *family(name).args, **family(name).kwargs)
    assert kept["s0_index"].shape == (1, 20)
    assert out["logits"].shape[1] == 5 + 20 + 7
    lengths = {n.meta["val"].shape[-2] for n in fast.graph_module.graph.nodes if "scaled_dot" in str(n.target)}
    assert 5 + 20 + 7 in lengths
    assert 5 + 49 + 7 not in lengths


def test_the_prompt_says_where_the_image_is(program):
    inside = tokcompile.optimize(program("hf/llava"), method="dart", budget=Tokens(20))
    assert counts(inside) == [(layer(inside, 2), 49, 20)]  # of the language model
    assert inside.plan.reductions[0].prefix == 5
    assert inside.plan.reductions[0].suffix == 7
    tower = tokcompile.optimize(program("hf/llava"), method="divprune", budget=Tokens(20))
    assert "vision_tower" in tower.plan.reductions[0].path
    first = dict(method="random", budget=Tokens(20), where=[layer(inside, 0)])
    named = tokcompile.optimize(program("hf/llava"), **first)
    by_hand = tokcompile.optimize(program("hf/llava"), **first, spans=[(5, 54)])
    assert named.plan == by_hand.plan
    assert any("positions 5 to 54" in guard for guard in named.report.guards)
    for start, stop, at in ((3, 40, 3), (54, 60, 54)):  # text beside the image's tokens, and text alone
        with pytest.raises(tokcompile.InputError, match=rf"the span \({start}, {stop}\) holds token {at}, .*\[\(5, 54\)\]"):
            tokcompile.optimize(program("hf/llava"), **first, spans=[(start, stop)])


def test_placeholders_elsewhere_are_refused(family, program):
    model, args, kwargs = family("hf/llava")
    fast = tokcompile.optimize(program("hf/llava"), method="random", budget=Tokens(20))
    moved = {**kwargs, "input_ids": kwargs["input_ids"].roll(1, 1)}
    with pytest.raises(tokcompile.InputError, match="tokens at other positions than the example"):
        fast(*args, **moved)
    other = {**kwargs, "input_ids": torch.where(kwargs["input_ids"] == 60, 60, kwargs["input_ids"] % 50 + 1)}
    assert run(fast, *args, **other)["logits"].shape[1] == 61
    whole = tokcompile.optimize(program("hf/llava"), budget=1.0)  # untouched: any prompt will do
    assert error(run(whole, *args, **moved)["logits"], run(model, *args, **moved)["logits"]) < 1e-5


def test_samples_with_their_images_at_other_places_are_refused(family):
    """A span would hold an image's tokens in one of them, and text in the other."""
    model, args, kwargs = family("hf/llava", 2)
    ids = torch.stack([kwargs["input_ids"][0], kwargs["input_ids"][1].roll(1)])
    with pytest.raises(tokcompile.InputError, match=r"sample 1 has its image at \(\(6, 55\),\), and sample 0 at \(\(5, 54"):
        tokcompile.optimize(model, args, {**kwargs, "input_ids": ids}, method="dart", spans=[(5, 54)])


def test_a_language_block_without_an_image_is_refused(family):
    with pytest.raises(tokcompile.UnsupportedGraph, match="which positions are visual") as refusal:
        tokcompile.optimize(family("hf/llama").model, kwargs=family("hf/llama").kwargs, method="random", where=[1])
    assert "spans=[(start, stop)]" in str(refusal.value)


def test_leaves_of_outputs_are_kept(family, program):
    fast = tokcompile.optimize(program("hf/llava"), method="tome", budget=0.5)
    want = leaves(run(family("hf/llava").model, **family("hf/llava").kwargs))
    got = leaves(run(fast, **family("hf/llava").kwargs))
    assert [g.shape for g in got] == [w.shape for w in want]


@pytest.mark.every(2)
@pytest.mark.parametrize("gap", [0, 3])
def test_two_images_in_one_prompt(gap, family):
    text, image = tokens(1, 15, 60), torch.full((1, 49), 60)
    ids = torch.cat([text[:, :5], image, text[:, 5 : 5 + gap], image, text[:, 8:]], 1)
    kwargs = dict(input_ids=ids, pixel_values=noise(2, 3, 56, 56), attention_mask=torch.ones_like(ids), use_cache=False)
    model = family("hf/llava").model
    check = tokcompile.check(model, kwargs=kwargs, blocks=[1, 5])
    assert check.ok, str(check)
    assert not any(r.note for r in check.results), str(check)
    fast = tokcompile.optimize(model, kwargs=kwargs, method="tome", budget=Tokens(20), outputs="reduced")
    out, kept = run(fast, **kwargs)
    assert out.logits.shape[1] == ids.shape[1] - 2 * 29
    assert torch.equal(torch.cat([kept["s2_0_index"], kept["s2_1_index"]]), kept["s2_index"])


class Prompts(nn.Module):
    """Two images for each prompt, side by side in the batch of the tower."""

    def __init__(self):
        super().__init__()
        self.tower, self.language = nn.ModuleList([Block(), Block()]), Block()

    def forward(self, images, text, ids):
        for block in self.tower:
            images = block(images)
        there = (ids == 9)[..., None].expand_as(text)
        return self.language(text.masked_scatter(there, images.flatten(0, 1)))


def test_two_images_in_each_of_three_prompts():
    model, images, text = Prompts().eval(), torch.randn(6, LENGTH, WIDTH), torch.randn(3, 2 * LENGTH + 5, WIDTH)
    image, word = torch.full((3, LENGTH), 9), torch.ones(3, 2, dtype=torch.int64)
    ids = torch.cat([word[:, :1], image, word, image, word], 1)
    options = dict(method="divprune", budget=Tokens(5), where=[1], outputs="reduced")
    out, kept = run(tokcompile.optimize(model, (images, text, ids), **options), images, text, ids)
    index = torch.stack([kept["s0_0_index"], kept["s0_1_index"]], 1).flatten(0, 1)
    rows = run(model.tower[0], images)[torch.arange(6)[:, None], index]
    features = run(model.tower[1], rows).split(1)
    for b, words in enumerate(text.split(1)):
        first, second = features[2 * b : 2 * b + 2]
        prompt = [words[:, :1], first, words[:, LENGTH + 1 : LENGTH + 3], second, words[:, 2 * LENGTH + 3 :]]
        assert error(out[b], run(model.language, torch.cat(prompt, 1))[0]) < 1e-5
