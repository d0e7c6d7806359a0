"""Generation after a reduced prefill against the model's layers run by hand over lists that grow, token by token."""

import pytest
import torch

from tests.conftest import error, run
from tests.llm.by_hand import ByHand, dropped
from tests.test_language import DECODERS, LAYER, SPAN, kept_by_dart, kept_by_fastv, recorded
from tokcompile import InputError
from tokcompile.llm import Generator, Sampling

COUNT = 32
TWO = dict(batch=2, spans=((20, 30), (31, 37)), schedule=((1, 10), (2, 5), (3, 0)))


def gone_by_reference(model, embeds, method, monkeypatch):
    """{layer: positions dropped there}, by the reference of the method on what the layers before it compute."""
    with monkeypatch.context() as patch, torch.no_grad():
        calls = recorded(patch)
        distance = torch.arange(embeds.shape[1])[:, None] - torch.arange(embeds.shape[1])
        mask = (distance >= 0) & (distance < (getattr(model.config, "sliding_window", None) or embeds.shape[1]))
        out = model.model(inputs_embeds=embeds, output_hidden_states=True, attention_mask=mask[None, None])
        norm = model.model.norm if hasattr(model.model, "norm") else model.model.final_layernorm
        rule = {"dart": kept_by_dart, "fastv": kept_by_fastv}[method]
        return {LAYER: dropped(rule(calls, norm(out.hidden_states[LAYER]), 11), *SPAN)}


def gone_at_random(generator, inputs):
    """`random` drops at the entrance of layers 1, 2 and 3, and has no reference but its own choice."""
    kept = run(generator.prefill, **inputs).kept
    return {layer: dropped(kept[name][0], *SPAN) for layer, name in ((1, "s0_index"), (2, "s1_index"), (3, "s2_index"))}


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["dart", "fastv", "random"])
@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_layers_run_by_hand(name, method, generator, monkeypatch):
    model, inputs, made = generator(name, method)
    embeds = inputs["inputs_embeds"]
    if method == "random":
        gone = gone_at_random(made, inputs)
        assert [(s.first, s.last, s.length) for s in made.wiring.stages] == [(0, 0, 40), (1, 1, 35), (2, 2, 30), (3, 3, 26)]
    else:
        gone = gone_by_reference(model, embeds, method, monkeypatch)
    got = made(**inputs, eos=(), keep_logits=True)
    want, logits = ByHand(model, gone).generate(embeds, COUNT)
    assert got.tokens.tolist() == [want]
    assert error(got.logits, logits) < 1e-4
    # some of these models fall into repeating one token: drawn tokens vary
    drawn = made(**inputs, eos=(), keep_logits=True, sampling=Sampling(2.0, seed=0))
    assert len(set(drawn.tokens[0].tolist())) > 10
    _, hidden = ByHand(model, gone, hide=True).generate(embeds, COUNT, drawn.tokens[0])
    assert error(drawn.logits, hidden) < 1e-4


@pytest.mark.every(2)
@pytest.mark.parametrize("name", [*DECODERS, "hf/gemma2", "hf/gpt2"])
def test_without_a_reduction_it_is_the_models_own_generation(name, generator):
    model, inputs, made = generator(name, "random", 1.0) if name != "hf/gpt2" else short_gpt2()
    count = made.wiring.max_new_tokens
    mask = torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.long)
    want = run(
        model.generate, **inputs, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert made(**inputs, eos=()).tokens.tolist() == want.tolist()


def short_gpt2():
    """GPT-2's table of positions ends at 64: 40 of the prompt and 24 more."""
    import tokcompile
    from tests.conftest import build
    from tokcompile.llm import Prefill

    model, _, kwargs = build("hf/gpt2")
    inputs = {"inputs_embeds": kwargs["inputs_embeds"]}
    prefill = tokcompile.optimize(Prefill(model), kwargs=inputs, method="random", budget=1.0, spans=[SPAN])
    with pytest.raises(InputError, match="position 71"):
        Generator(prefill, model, max_new_tokens=COUNT)
    return model, inputs, Generator(prefill, model, max_new_tokens=24)


def test_stages_windows_spans_and_samples(generator):
    """Two reductions of two spans in turn, each sample with its own tokens, under a sliding window; then all of them go."""
    model, inputs, made = generator("hf/mistral", "fastv", **TWO)
    assert [(s.first, s.last, s.length) for s in made.wiring.stages] == [(0, 0, 40), (1, 1, 34), (2, 2, 29), (3, 3, 24)]
    kept = run(made.prefill, **inputs).kept
    assert not torch.equal(kept["s1_index"][0], kept["s1_index"][1])
    got = made(**inputs, eos=(), keep_logits=True)
    for row in range(2):
        gone = {
            layer: set.union(*(dropped(kept[f"s{i}_index"][row], *span) for i, span in zip(names, TWO["spans"])))
            for layer, names in ((1, (0, 1)), (2, (2, 3)))
        } | {3: {p for span in TWO["spans"] for p in range(*span)}}
        want, logits = ByHand(model, gone).generate(inputs["inputs_embeds"][row : row + 1], COUNT)
        assert got.tokens[row].tolist() == want
        assert error([one[row] for one in got.logits], [one[0] for one in logits]) < 1e-4


@pytest.mark.parametrize("name", ["hf/llama", "hf/mistral"])
def test_padding_on_the_left_is_never_seen(name, generator):
    model, inputs, made = generator(name, "random", padded=True)
    gone = gone_at_random(made, inputs)
    got = made(**inputs, eos=(), keep_logits=True)
    want, logits = ByHand(model, gone, padding=range(4)).generate(inputs["inputs_embeds"], COUNT)
    assert got.tokens.tolist() == [want]
    assert error(got.logits, logits) < 1e-4


def test_ends_at_the_end_of_text_row_by_row(generator):
    _, inputs, made = generator("hf/mistral", "fastv", **TWO)
    free = made(**inputs, eos=()).tokens.tolist()
    ends = free[0][3], free[1][9]
    stops = [next(i for i, token in enumerate(row) if token in ends) for row in free]
    assert stops[0] != stops[1]
    want = [row[: stop + 1] + [row[stop]] * (max(stops) - stop) for row, stop in zip(free, stops)]
    assert made(**inputs, eos=ends).tokens.tolist() == want


def test_sampling_is_reproducible_and_keeps_to_the_likeliest(generator):
    _, inputs, made = generator("hf/llama")
    draw = made(**inputs, eos=(), sampling=Sampling(1.0, top_k=4, seed=1), keep_logits=True)
    again = made(**inputs, eos=(), sampling=Sampling(1.0, top_k=4, seed=1))
    assert draw.tokens.tolist() == again.tokens.tolist() != made(**inputs, eos=()).tokens.tolist()
    for token, logits in zip(draw.tokens[0], draw.logits):
        assert token in logits[0].topk(4).indices
    assert made(**inputs, eos=(), sampling=Sampling(1.0, top_k=1)).tokens.tolist() == made(**inputs, eos=()).tokens.tolist()
    with pytest.raises(InputError, match="temperature"):
        made(**inputs, sampling=Sampling(-1.0))


def test_fewer_tokens_are_the_first_ones(generator):
    _, inputs, made = generator("hf/llama")
    assert made(**inputs, eos=(), max_new_tokens=1).tokens_per_second is None
    few = made(**inputs, eos=(), max_new_tokens=5)
    assert few.tokens.tolist() == made(**inputs, eos=()).tokens[:, :5].tolist()
    assert few.first_token_ms > 0
    assert few.tokens_per_second > 0
