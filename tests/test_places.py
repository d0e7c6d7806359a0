"""Several methods in one model: in the vision tower, and at a layer of the language model behind it."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import counts, error, layer, run
from tests.tiny import LENGTH, WIDTH, Tiny
from tokcompile import Flops, InputError, Keep, Plan, PlanError, Recipe, Tokens

LLAVA = "hf/llava"


@pytest.fixture(scope="module")
def both(program):
    tower = tokcompile.optimize(program(LLAVA), method="tome", budget=Tokens(30), outputs="reduced")
    return tower, tokcompile.optimize(tower, method="dart", budget=Tokens(12), outputs="reduced")


def test_the_second_place_goes_on_from_the_first(both, family):
    tower, two = both
    assert counts(two) == [*counts(tower), (layer(two, 2), 30, 12)]
    assert str(two.plan).startswith("tome and dart, 4 reductions")
    assert [(b["tokens"], b["left"]) for b in two.report.blocks[layer(two, 0) :]] == [(42, 42), (42, 42), (42, 24), (24, 24)]
    out, kept = run(two, **family(LLAVA).kwargs)
    assert out["logits"].shape[1] == 24
    assert kept["s3_index"].shape == (1, 12)
    assert counts(tower) == [(0, 49, 43), (1, 43, 37), (2, 37, 30)]  # the first one is what it was


def test_the_second_method_sees_what_the_first_left(both, family):
    """A method inside the language model that keeps everything changes nothing but the order of its own tokens."""
    tower, _ = both
    same = Recipe("all of them", lambda t, s: Keep(torch.arange(s.k).expand(t.x.shape[0], -1)), place="block")
    again = tokcompile.optimize(tower, method=same, budget=Tokens(29), where=[layer(tower, 2)], outputs="reduced")
    out, kept = run(again, **family(LLAVA).kwargs)
    want, before = run(tower, **family(LLAVA).kwargs)
    assert torch.equal(kept["s3_index"], before["s2_index"][:, :29])
    text = error(out["logits"][:, :5], want["logits"][:, :5])  # before the image: causal, so untouched
    assert text < 1e-5


def test_a_method_counts_the_blocks_of_its_own_stack(both, program):
    """PiToMe's margin falls over the depth of the tower, whatever language model comes behind it."""
    seen = []
    asked = Recipe("asked", lambda t, s: (seen.append(s), Keep(torch.arange(s.k).expand(t.x.shape[0], -1)))[1], place="block")
    tower, _ = both
    tokcompile.optimize(program(LLAVA), method=asked, budget=Tokens(30), where=[1], outputs="reduced")
    assert {(s.block, s.depth) for s in seen} == {(1, 3)}
    seen.clear()
    tokcompile.optimize(tower, method=asked, budget=Tokens(29), where=[layer(tower, 2)], outputs="reduced")
    assert {(s.block, s.depth) for s in seen} == {(2, 4)}


@pytest.mark.matrix
def test_files_hold_both(both, program, family, tmp_path):
    _, two = both
    again = tokcompile.optimize(program(LLAVA), plan=Plan.from_json(two.plan.json()))
    assert again.plan == two.plan
    kwargs = family(LLAVA).kwargs
    assert error(run(again, **kwargs), run(two, **kwargs)) == 0
    again.save(tmp_path / "two.pt2")
    loaded = tokcompile.load(tmp_path / "two.pt2")
    assert loaded.plan == two.plan
    assert error(run(loaded, **kwargs), run(two, **kwargs)) == 0
    report = two.export_onnx(tmp_path / "two.onnx")
    assert report.nodes == {"Tome": 3, "DartPlain": 1}


def test_flops_of_both(both):
    tower, _ = both
    two = tokcompile.optimize(tower, method="random", budget=Flops(0.6), where=[layer(tower, 1)], outputs="reduced")
    assert two.report.flops_ratio <= 0.6 < tower.report.flops_ratio
    more = two.plan.reductions[-1].k + 1
    beyond = tokcompile.optimize(tower, method="random", budget=Tokens(more), where=[layer(tower, 1)], outputs="reduced")
    assert beyond.report.flops_ratio > 0.6


def test_two_methods_in_one_tower(program, family, tmp_path):
    first = tokcompile.optimize(program("timm/vit"), method="tome", budget=0.5, where=[0, 1])
    two = tokcompile.optimize(first, method="evit", budget=0.5, where=[3])
    assert counts(two) == [(0, 49, 37), (1, 37, 25), (3, 25, 13)]
    assert two.export_onnx(tmp_path / "vit.onnx").nodes == {"Tome": 2, "EvitPlain": 1}  # evit's plugin knows no sizes
    assert run(two, *family("timm/vit").args).shape == run(first, *family("timm/vit").args).shape


def test_nothing_more(both, family):
    tower, _ = both
    same = tokcompile.optimize(tower, method="dart", budget=1.0, outputs="reduced")
    assert error(run(same, **family(LLAVA).kwargs), run(tower, **family(LLAVA).kwargs)) == 0


@pytest.mark.parametrize(("error", "options", "message"), [
    (PlanError, dict(method="topk", budget=Tokens(5), where=[1]), "reduced at block {last}.*'topk' would be placed at block 1"),
    (InputError, dict(method="topk", outputs="keep", where=[6]), "pass the same again"),
    (InputError, dict(kwargs={"x": 1}), "brings its example inputs along"),
    (PlanError, dict(plan=Plan("tome", outputs="reduced")), "a plan is for the original model"),
    (tokcompile.UnsupportedGraph, dict(method="random", where=[6], spans=[(7, 40)]), "are not those that were reduced before"),
])  # fmt: skip
def test_refusals(error, options, message, both):
    _, two = both
    with pytest.raises(error, match=message.format(last=layer(two, 2))):
        tokcompile.optimize(two, **{"outputs": "reduced", **options})


class TwoTowers(nn.Module):
    """Crops go through one tower, the whole image through another after it; the crops' tokens are used as a grid, which
    nothing of the other tower depends on."""

    def __init__(self):
        super().__init__()
        self.crops, self.whole = Tiny(), Tiny()

    def forward(self, crops, image):
        grid = self.crops(crops).unflatten(1, (3, 4)).mean(2)
        return grid, self.whole(image)


def test_tokens_are_given_back_beside_other_blocks_too():
    model, inputs = TwoTowers().eval(), (torch.randn(5, LENGTH, WIDTH), torch.randn(1, LENGTH, WIDTH))
    optimized = tokcompile.optimize(model, inputs, method="random", budget=0.5)
    assert [b for b, _, _ in counts(optimized)] == [0, 1, 2]  # the tower that sees more
    (recovery,) = optimized.report.recoveries
    assert not recovery["inside"]
    assert torch.equal(run(optimized, *inputs)[1], model(*inputs)[1])


class Captioned(nn.Module):
    """Between its blocks the tokens look at a caption."""

    def __init__(self):
        super().__init__()
        self.tiny = Tiny()
        self.looks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))

    def forward(self, x, caption):
        for block, look in zip(self.tiny.blocks, self.looks):
            x = block(x)
            x = x + look(x, caption, caption, need_weights=False)[0]
        return x


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["tome", "evit", "pitome"])
def test_methods_read_how_tokens_look_at_each_other(method):
    model, inputs = Captioned().eval(), (torch.randn(2, LENGTH, WIDTH), torch.randn(2, 5, WIDTH))
    optimized = tokcompile.optimize(model, inputs, method=method, budget=0.5)
    assert run(optimized, *inputs).shape == inputs[0].shape
    assert [b for b, _, _ in counts(optimized)] == [0, 2, 4]
    assert tokcompile.check(model, inputs).ok


class Cameras(nn.Module):
    """One tower that is called with each of two images, as policies of robots do."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.patch, self.blocks = nn.Conv2d(3, 32, 4, 4), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def tower(self, image):
        return self.blocks(self.patch(image).flatten(2).transpose(1, 2)).mean(1)

    def forward(self, *images):
        return torch.cat([self.tower(image) for image in images], -1)


@pytest.mark.every(2)
@pytest.mark.parametrize(("method", "budget", "where"), [("tome", 0.5, None), ("topk", Flops(0.8), None),
                                                         ("fastv", 0.5, ["blocks.layers.1"])])  # fmt: skip
def test_each_call_of_a_tower_is_reduced(method, budget, where):
    model, images = Cameras().eval(), torch.randn(2, 1, 3, 24, 24)
    two = tokcompile.optimize(model, tuple(images), method=method, budget=budget, where=where)
    steps = counts(two)[: len(counts(two)) // 2]
    assert counts(two) == [*steps, *((block + 3, n, k) for block, n, k in steps)]
    alone = [tokcompile.optimize(model, (image,), method=method, budget=budget, where=where) for image in images]
    assert [counts(one) for one in alone] == [steps, steps]
    assert error(run(two, *images), torch.cat([run(one, image) for one, image in zip(alone, images)], -1)) < 1e-5
    assert counts(tokcompile.optimize(model, tuple(images), plan=two.plan)) == counts(two)


class Joined(Cameras):
    """A language model whose prompt is joined from embeddings and image features, sample by sample, as in LLaVA's own code."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.words, self.layers = nn.Embedding(9, 32), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, image, ids):
        features = self.blocks(self.patch(image).flatten(2).transpose(1, 2))
        x = torch.stack([torch.cat([self.words(i[:3]), f, self.words(i[3:])]) for i, f in zip(ids, features)])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layers(x, mask, is_causal=True)


def joined(samples):
    return Joined().eval(), (torch.randn(samples, 3, 24, 24), torch.randint(9, (samples, 7)))


def test_the_tower_before_a_joined_prompt_is_reduced():
    model, args = joined(1)
    assert {block for block, *_ in counts(tokcompile.optimize(model, args, method="tome"))} == {0, 1, 2}


def test_the_image_in_a_joined_prompt_is_found_or_asked_for():
    model, args = joined(1)
    (reduction,) = tokcompile.optimize(model, args, method="random", where=[4]).plan.reductions
    assert (reduction.n, reduction.prefix, reduction.suffix) == (36, 3, 4)
    model, args = joined(2)
    with pytest.raises(tokcompile.UnsupportedGraph, match="spans"):
        tokcompile.optimize(model, args, method="random", where=[4])


def test_embeddings_of_text_and_of_what_a_tower_left(program, family):
    """A method that reads what came into the language model reads the features that are left there, and no other text."""

    def plan(t, s):
        score = t.embeds.double() @ t.text_embeds.double().mul(torch.arange(12)[:, None]).sum(1)[..., None]
        return Keep(score[..., 0].topk(s.k, -1).indices.sort(-1).values)

    model, _, kwargs = family(LLAVA)
    tower = tokcompile.optimize(program(LLAVA), method="divprune", budget=Tokens(20), where=[2], outputs="reduced")
    before, first = run(tower, **kwargs)
    text = model.get_input_embeddings()(kwargs["input_ids"][:, [*range(5), *range(54, 61)]]).double()
    score = before["image_hidden_states"].view(1, 20, -1).double() @ text.mul(torch.arange(12)[:, None]).sum(1)[..., None]
    want = first["s0_index"].gather(1, score[..., 0].topk(8, -1).indices.sort(-1).values)
    like_text = Recipe("like text", plan, taps=("embeds", "text_embeds"), place="block")
    two = tokcompile.optimize(tower, method=like_text, budget=Tokens(8), where=[layer(tower, 1)], outputs="reduced")
    assert torch.equal(run(two, **kwargs).kept["s1_index"], want)
