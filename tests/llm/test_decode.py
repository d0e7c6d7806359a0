"""The decode graph: its inputs and shapes, the prefills it takes, and what it refuses."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import build, error, export, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import noise, seeded
from tests.models.hf_base import DECODER, class_of
from tests.test_language import SPAN
from tokcompile import InputError, Tokens
from tokcompile.llm import Generator, Prefill, decode_graph
from tokcompile.llm.caches import AttendsItself, attention
from tokcompile.llm.decode import check_model
from tokcompile.llm.generate import program, start
from tokcompile.llm.layout import layout

REDUCED = dict(method="dart", budget=Tokens(11), spans=[SPAN], outputs="reduced")


def test_buffers_are_static_and_as_long_as_their_stage(generator):
    _, _, made = generator("hf/llama")
    shapes = dict(zip(made.decode.input_names, (tuple(v.shape) for v in made.decode.example_inputs)))
    assert shapes.pop("token") == shapes.pop("position_ids") == (1, 1)
    assert shapes.pop("step") == (1,)
    assert {name: shape[2] for name, shape in shapes.items()} == {
        f"{kind}_{layer}": 72 if layer < 2 else 58 for kind in ("keys", "values") for layer in range(4)
    }


def test_only_windows_and_padding_need_to_know_what_was_kept(generator):
    assert "kept_s0_index" not in generator("hf/llama")[2].decode.input_names
    assert "kept_s0_index" in generator("hf/mistral")[2].decode.input_names
    assert {"kept_s0_index", "attention_mask"} <= {*generator("hf/llama", "random", padded=True)[2].decode.input_names}


def test_the_models_own_cache_and_logits_of_all_tokens_are_taken(generator):
    model, _, kwargs = build("hf/llama_cache")
    made = Generator(tokcompile.optimize(export("hf/llama_cache"), **REDUCED), model, max_new_tokens=8)
    assert [s.length for s in made.wiring.stages] == [40, 26]
    want = generator("hf/llama")[2](inputs_embeds=kwargs["inputs_embeds"], eos=(), max_new_tokens=8)
    assert made(inputs_embeds=kwargs["inputs_embeds"], eos=()).tokens.tolist() == want.tokens.tolist()


def test_given_positions_go_on_after_their_last(generator):
    """Rotary attention sees differences only: the same text 7 positions later."""
    model, inputs, _ = generator("hf/llama")
    inputs = {**inputs, "position_ids": torch.arange(7, 47)[None]}
    later = Generator(
        tokcompile.optimize(Prefill(model), kwargs=inputs, method="random", budget=1.0, spans=[SPAN]), model, max_new_tokens=8
    )
    plain = generator("hf/llama", "random", 1.0)[2]
    got = later(**inputs, eos=(), keep_logits=True)
    want = plain(inputs_embeds=inputs["inputs_embeds"], eos=(), max_new_tokens=8, keep_logits=True)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert error(got.logits, want.logits) < 1e-4


def test_the_model_is_left_as_it_was(generator):
    model, inputs, _ = generator("hf/llama")
    before = run(model, **inputs).logits
    decode_graph(model, generator("hf/llama")[2].prefill, max_new_tokens=4)
    assert torch.equal(run(model, **inputs).logits, before)


def refused(match, prefill, model, count=8):
    with pytest.raises(InputError, match=match) as caught:
        decode_graph(model, prefill, max_new_tokens=count)
    assert "\n" in str(caught.value) or ":" in str(caught.value)


def test_prefills_that_cannot_be_continued(generator):
    model, inputs, made = generator("hf/llama")
    whole = dict(method="random", budget=Tokens(11), spans=[SPAN])
    refused('optimize it with outputs="reduced"', tokcompile.optimize(Prefill(model), kwargs=inputs, **whole), model)
    refused("no caches were found", tokcompile.optimize(export("hf/llama"), **whole, outputs="reduced"), model)
    refused("at least one token", made.prefill, model, 0)
    refused(
        "takes x, and neither inputs_embeds nor input_ids",
        tokcompile.optimize(Renamed(model).eval(), (inputs["inputs_embeds"],), **REDUCED),
        model,
    )
    refused("and 2 layers of this model have one: it is another one", made.prefill, of_layers(model, 2))
    refused("returns 4 caches, and more layers of this model have one: it is another one", made.prefill, of_layers(model, 5))


class Renamed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.prefill = Prefill(model)

    def forward(self, x):
        return self.prefill(x)


def of_layers(model, count):
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": count, "layer_types": None})
    return type(model)(config).eval()


def test_layers_may_share_keys_without_a_word_in_the_configuration(generator):
    """As those of Mistral Large 4 do, by a list of its own: which ones attend to which keys is seen when it runs."""
    model, _, made = generator("hf/llama")
    plan = layout(made.prefill, 8)
    two = dataclasses.replace(plan, keys=plan.keys[:2], values=plan.values[:2])
    check_model(model, two)
    with pytest.raises(InputError, match="returns 2 caches, and 1 layers"):
        check_model(of_layers(model, 1), two)


def test_a_cache_cut_to_its_window_is_refused():
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    model, _, kwargs = build("hf/mistral")
    prefill = tokcompile.optimize(model, kwargs={**kwargs, "use_cache": True}, method="random", budget=1.0, spans=[SPAN])
    refused("layer 0 holds 15 tokens, and by the plan a layer holds 40", prefill, model)


def test_spans_must_be_named(generator):
    model, inputs, _ = generator("hf/llama")
    with pytest.raises(tokcompile.UnsupportedGraph, match=r"name them: spans=\[\(start, stop\)\]"):
        tokcompile.optimize(Prefill(model), kwargs=inputs, method="dart", budget=Tokens(11), outputs="reduced")


def test_models_that_cannot_be_decoded(generator):
    model, _, made = generator("hf/llama")
    refused("training mode", made.prefill, type(model)(model.config).train())
    refused("takes no input_ids and no past_key_values", made.prefill, nn.Linear(2, 2).eval())
    with pytest.raises(InputError, match=r"Linear.forward takes no past_key_values.*\n.*any other one can be optimized itself"):
        Prefill(nn.Linear(2, 2).eval())


class Picky(nn.Module):
    """As MiniMax, whose cache has a place for lightning attention, and MiniMax M3, whose layers of it have one for blocks."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def forward(self, inputs_embeds, past_key_values, use_cache):
        if self.asks:
            return past_key_values.layers[0].update_index(inputs_embeds)
        raise ValueError(f"not compatible with `past_key_values` of type {type(past_key_values)}")


@pytest.mark.parametrize(("asks", "why"), [(False, "not compatible"), (True, ".*has no attribute 'layers'")])
def test_a_model_that_takes_only_its_own_cache_is_refused(asks, why):
    with pytest.raises(InputError, match=rf"^Picky takes only a cache of its own kind: {why}.*\n.*nothing yet"):
        tokcompile.optimize(Prefill(Picky(asks).eval()), kwargs={"inputs_embeds": noise(1, 8, 4)}, budget=1.0)


def test_calls_that_do_not_fit(generator):
    _, inputs, made = generator("hf/llama")
    for match, call in {
        "take 1 to 32 tokens": dict(inputs, max_new_tokens=33),
        "compiled for 1x40x48 float32": {"inputs_embeds": torch.zeros(1, 41, 48)},
        "input inputs_embeds is missing: 1x40x48": {},
        "takes inputs_embeds, and not pixel_values": dict(inputs, pixel_values=torch.zeros(1)),
    }.items():
        with pytest.raises(InputError, match=match):
            made(**call)


@pytest.mark.parametrize(("at", "what"), [(39, "the prompt ends in padding"), (6, "a visual token, of 5 to 30")])
def test_padding_is_for_text_and_on_its_left(at, what, generator):
    _, inputs, made = generator("hf/llama", "random", padded=True)
    mask = inputs["attention_mask"].clone()
    mask[0, at] = 0
    with pytest.raises(InputError, match=rf"attention_mask\[0, {at}\] is 0, and .*{what}"):
        made(**{**inputs, "attention_mask": mask})


def test_a_cache_of_another_stage_length_is_refused(generator):
    _, inputs, made = generator("hf/llama")
    out = run(program(made.prefill), inputs)
    out["keys_2"] = out["keys_0"]
    with pytest.raises(InputError, match=r"keys_2 of layer 2 holds 40 tokens, and layers 2 to 3 hold 26"):
        start(made.wiring, inputs, out)


def test_attention_that_several_layers_share_does_not_say_which_one_it_is():
    """Zamba's, whose masks are then left to the model."""
    with pytest.raises(AttendsItself, match="does not say in which of them it is called"):
        attention(None, None, [])(SimpleNamespace(layer_idx=None), None, None, None, None)


def small(name, **options):
    """A shaken model of two layers by the name of its family in transformers."""
    with seeded():
        model = class_of(f"{name}ForCausalLM")(class_of(f"{name}Config")(**DECODER | dict(num_hidden_layers=2), **options))
    return shake(model.eval())


def reduced(model, length, budget=1.0):
    inputs = {"inputs_embeds": noise(1, length, 48)}
    spans, options = [(5, 20)], dict(method="dart", outputs="reduced", where=[1])
    return inputs, tokcompile.optimize(Prefill(model), kwargs=inputs, budget=budget, spans=spans, **options)


@pytest.mark.parametrize(("length", "budget"), [(28, 1.0), (28, Tokens(6)), (45, Tokens(6))])
def test_rotary_angles_that_depend_on_the_length(length, budget):
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 6, long_factor=[4.0] * 6, factor=3.2)
    model = small("Phi3", original_max_position_embeddings=40, rope_parameters=rope | dict(original_max_position_embeddings=40))
    inputs, prefill = reduced(model, length, budget)
    made = Generator(prefill, model, max_new_tokens=12)(**inputs, eos=(), keep_logits=True)
    gone = dropped(run(prefill, **inputs).kept["s0_index"][0], 5, 20) if budget != 1.0 else set()
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    with hidden(gone, range(1, 24, 2)):
        want = run(model.generate, **inputs, **options)
    assert torch.equal(made.tokens, want.sequences)
    assert all(error(got, one) < 1e-5 for got, one in zip(made.logits, want.logits))
    if length < 40:
        with pytest.raises(InputError, match="from token 40 on this model turns its keys by other angles"):
            Generator(prefill, model, max_new_tokens=13)


@pytest.mark.matrix
def test_values_that_are_fixed_from_the_examples_tokens_are_refused():
    """Otherwise every token would go to the experts of the example's."""
    model = small("Mixtral", num_local_experts=4, experts_implementation="eager")
    _, prefill = reduced(model, 28)
    with pytest.raises(InputError, match=r"(?s)tracing has fixed values.*nonzero gave.*batched_mm"):
        Generator(prefill, model, max_new_tokens=4)
    model.set_experts_implementation("grouped_mm")
    _, prefill = reduced(model, 28)
    decode_graph(model, prefill, max_new_tokens=4)
    model.set_experts_implementation("eager")
    with pytest.raises(InputError, match="tracing has fixed values"):
        decode_graph(model, prefill, max_new_tokens=4)
