"""Tokens numbered anew after a reduction, against the model on a prompt that never had the dropped ones."""

import pytest
import torch

import tokcompile
from tests.conftest import build, error, run
from tests.methods.test_language_models import SPAN, three_axes
from tokcompile import InputError, MethodError, Recipe, Tokens, UnsupportedGraph
from tokcompile.llm import Generator, Prefill

BEFORE = dict(method="divprune", where=[0], budget=Tokens(11), spans=[SPAN], outputs="reduced", renumber=True)


def shorter(x, kept):
    """x: (B, 40, ...) with the span's tokens as they are kept: (B, k)."""
    rows = [torch.cat([torch.arange(SPAN[0]), row + SPAN[0], torch.arange(SPAN[1], 40)]) for row in kept]
    return torch.stack([one[row] for one, row in zip(x, rows)])


@pytest.mark.parametrize("name", ["hf/llama", "hf/qwen3", "hf/phi"])
def test_equals_the_shorter_prompt(name):
    model, _, kwargs = build(name, 2)
    optimized = tokcompile.optimize(model, kwargs=kwargs, **BEFORE)
    out, kept = run(optimized, **kwargs)
    short = shorter(kwargs["inputs_embeds"], kept["s0_index"])
    assert error(out["logits"], run(model, inputs_embeds=short, use_cache=False).logits) < 1e-5
    assert optimized.renumbered


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["hf/llama", "hf/llama_eager"])
@pytest.mark.parametrize(("method", "options"), [("divprune", {}), ("sparsevlm", {"where": [2]})])
def test_padding_and_masks_that_are_written_out(method, options, name):
    """What stands behind padding comes out as without it, in whatever order the tokens are."""
    model, _, kwargs = build(name)
    x = kwargs["inputs_embeds"]
    plain = tokcompile.optimize(Prefill(model), kwargs={"inputs_embeds": x}, **{**BEFORE, "method": method, **options})
    padded = torch.cat([torch.randn(1, 3, x.shape[2]), x], 1)
    mask = torch.ones(1, 43, dtype=torch.long).index_fill(1, torch.arange(3), 0)
    spans = [(SPAN[0] + 3, SPAN[1] + 3)]
    inputs = {"inputs_embeds": padded, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    again = tokcompile.optimize(Prefill(model), kwargs=inputs, **{**BEFORE, "method": method, **options, "spans": spans})
    (want, kept), (got, kept_too) = run(plain, inputs_embeds=x), run(again, **inputs)
    assert torch.equal(kept["s0_index"], kept_too["s0_index"])
    assert error(got["logits"], want["logits"]) < 1e-5


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["hf/llama_eager", "hf/llama_padded", "hf/gemma3_text", "hf/qwen2", "hf/mistral"])
def test_the_published_default_finds_rotary_tables(name):
    model, args, kwargs = build(name)
    optimized = tokcompile.optimize(model, args, kwargs, method="pyramiddrop", spans=[SPAN], budget=Tokens(8))
    assert optimized.renumbered


def test_positions_that_are_an_input_must_go_on_by_one():
    model, _, kwargs = build("hf/llama")
    x, places = kwargs["inputs_embeds"], torch.arange(40)[None]
    gaps = places + (places > 20) * 5
    optimized = tokcompile.optimize(model, kwargs={"inputs_embeds": x, "position_ids": places, "use_cache": False}, **BEFORE)
    out, kept = run(optimized, inputs_embeds=x, position_ids=places + 7, use_cache=False)
    want = run(model, inputs_embeds=shorter(x, kept["s0_index"]), use_cache=False).logits
    assert error(out["logits"], want) < 1e-5
    assert any("goes on by one from token 5 to 30" in line for line in optimized.report.guards)
    with pytest.raises(InputError, match=r"(?s)position_ids has gaps between the tokens 5 and 30.*renumber=False"):
        optimized(inputs_embeds=x, position_ids=gaps, use_cache=False)
    with pytest.raises(UnsupportedGraph, match="no rotary table over consecutive positions"):
        tokcompile.optimize(model, kwargs={"inputs_embeds": x, "position_ids": gaps, "use_cache": False}, **BEFORE)
    kept = tokcompile.optimize(
        model,
        kwargs={"inputs_embeds": x, "position_ids": gaps, "use_cache": False},
        method="pyramiddrop",
        spans=[SPAN],
        budget=Tokens(11),
    )
    assert not kept.renumbered


def test_three_axes_keep_their_positions():
    model, inputs = three_axes()
    given = dict(kwargs={**inputs, "use_cache": False}, method="sparsevlm", spans=[SPAN], budget=Tokens(11), outputs="reduced")
    outs = [tokcompile.optimize(model, **given, **more) for more in ({}, {"renumber": False})]
    assert [o.renumbered for o in outs] == [False, False]
    assert error(*(run(o, **given["kwargs"]).output["last_hidden_state"] for o in outs)) == 0
    with pytest.raises(UnsupportedGraph, match="no rotary table over consecutive positions"):
        tokcompile.optimize(model, **given, renumber=True)


@pytest.mark.parametrize("name", ["hf/gpt2", "timm/vit", "timm/vit_rope"])
def test_other_positions_cannot_be_renumbered(name):
    model, args, kwargs = build(name)
    spans = [SPAN] if "inputs_embeds" in kwargs else None
    with pytest.raises(UnsupportedGraph, match=r"(?s)random was asked to number.*node: .*leave renumber out"):
        tokcompile.optimize(model, args, kwargs, method="random", spans=spans, renumber=True)


def test_what_is_said_must_be_yes_or_no():
    model, _, kwargs = build("hf/llama")
    with pytest.raises(MethodError, match="renumber='yes' is neither True nor False"):
        tokcompile.optimize(model, kwargs=kwargs, **{**BEFORE, "renumber": "yes"})


def test_a_recipe_of_ones_own_says_when():
    model, _, kwargs = build("hf/llama")
    given = dict(place="block", steps=tokcompile.steps.stages(0.25, 0.75), renumber=lambda step, options: step == 1)
    recipe = Recipe("last", lambda tokens, site: tokcompile.Keep(torch.arange(site.n - site.k, site.n)[None]), **given)
    inputs = dict(kwargs=kwargs, method=recipe, spans=[SPAN], budget=Tokens(11), outputs="reduced")
    outs = [tokcompile.optimize(model, **inputs, **more) for more in ({}, {"renumber": True}, {"renumber": False})]
    assert [o.renumbered for o in outs] == [True, True, False]
    assert len({tuple(run(o, **kwargs).output["logits"].flatten().tolist()) for o in outs}) == 3


def test_windows_that_end_within_the_prompt():
    model, _, kwargs = build("hf/mistral")
    inputs = {"inputs_embeds": kwargs["inputs_embeds"]}
    prefill = tokcompile.optimize(Prefill(model), kwargs=inputs, **BEFORE)
    with pytest.raises(InputError, match=r"(?s)divprune numbers tokens anew, and sliding windows.*renumber=False"):
        Generator(prefill, model, max_new_tokens=8)


def test_the_plan_carries_it(tmp_path):
    model, _, kwargs = build("hf/llama")
    optimized = tokcompile.optimize(model, kwargs=kwargs, **BEFORE)
    assert tokcompile.Plan.from_json(optimized.plan.json()).options["renumber"] is True
    optimized.save(tmp_path / "m.pt2")
    again = tokcompile.load(tmp_path / "m.pt2")
    assert error(run(again, **kwargs).output["logits"], run(optimized, **kwargs).output["logits"]) == 0
