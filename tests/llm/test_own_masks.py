"""Decoders that make masks and biases themselves (ALiBi, attention in code of their own), or whose layers attend several times,
against the whole text computed anew for each token, with dropped keys that nobody sees."""

from contextlib import ExitStack

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import noise
from tests.models.hf_base import BODY, DECODER, build
from tokcompile import InputError, Tokens, TraceError, UnsupportedGraph
from tokcompile.llm import Generator, Prefill, export

LENGTH, SPAN, COUNT = 40, (5, 30), 32
TEXT = dict(vocab_size=64, bos_token_id=0, eos_token_id=63, pad_token_id=0)
GPT_NEO = dict(
    hidden_size=48, num_layers=4, num_heads=4, vocab_size=64, attention_types=[[["global", "local"], 2]], window_size=16
)
MODELS = {
    "Bloom": dict(hidden_size=48, n_layer=4, n_head=4, vocab_size=64),
    "Mpt": dict(d_model=48, n_layers=4, n_heads=4, vocab_size=64, max_seq_len=80),
    "Falcon": BODY | TEXT,  # one key head, rotary positions
    "TrOCR": dict(d_model=48, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=64),  # arange(length)
    "XGLM": dict(d_model=48, num_layers=4, attention_heads=4, ffn_dim=96, vocab_size=64),  # checks the size of its mask
    "Doge": DECODER,  # a learned bias, made from the values
    "Data2VecText": BODY | TEXT | dict(is_decoder=True, max_position_embeddings=128, pad_token_id=1),  # counts positions from 2
    "DiffLlama": DECODER,  # attends twice in a layer
    "HrmText": DECODER | dict(num_hidden_layers=2, head_dim=12, H_cycles=1, L_cycles=2),  # goes through some layers again
}
CALLS = {"DiffLlama": 2}  # of attention, in a layer


def model_of(name, batch=1, **options):
    options = {**MODELS.get(name, {}), **options}
    return shake(build(f"{name}ForCausalLM", f"{name}Config", options, lambda batch: {}, batch)[0]), noise(batch, LENGTH, 48)


def prefill_of(model, inputs, **options):
    options = dict(method="random", budget=Tokens(11)) | options
    return tokcompile.optimize(Prefill(model), kwargs=inputs, spans=[SPAN], outputs="reduced", **options)


def anew(model, inputs, tokens, gone, calls=1):
    """The logits that each of the tokens was chosen from. gone: {layer: positions that nobody sees from there on}."""
    table, mask = model.get_input_embeddings(), inputs.get("attention_mask")
    made = []
    for step in range(tokens.shape[1]):
        text = torch.cat([inputs["inputs_embeds"], run(table, tokens[:, :step])], 1)
        given = {} if mask is None else {"attention_mask": torch.nn.functional.pad(mask, (0, step), value=1)}
        with ExitStack() as stack:
            for layer, positions in gone.items():
                stack.enter_context(hidden(positions, range(calls * layer, 99)))
            made.append(run(model, inputs_embeds=text, use_cache=False, **given).logits[:, -1])
    return made


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_whole_text_with_keys_that_nobody_sees(name):
    model, embeds = model_of(name)
    inputs = {"inputs_embeds": embeds}
    prefill = prefill_of(model, inputs, where=[2])
    got = Generator(prefill, model, max_new_tokens=COUNT)(**inputs, eos=(), keep_logits=True)
    gone = dropped(run(prefill, **inputs).kept["s0_index"][0], *SPAN)
    want = anew(model, inputs, got.tokens, {2: gone}, CALLS.get(name, 1))
    assert got.tokens.tolist() == [[int(one.argmax()) for one in want]]
    assert error(got.logits, want) < 1e-4


def test_stages_samples_and_padding():
    """A bias by distance (ALiBi) that does not count padding, after three reductions, each sample with its own tokens."""
    model, embeds = model_of("Bloom", batch=2)
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    inputs["attention_mask"][0, :3] = 0
    prefill = prefill_of(model, inputs, method="fastv", budget=tokcompile.Schedule({1: 18, 3: 9}))
    generator = Generator(prefill, model, max_new_tokens=8)
    assert [s.length for s in generator.wiring.stages] == [40, 33, 24]
    got, kept = generator(**inputs, eos=(), keep_logits=True), run(prefill, **inputs).kept
    assert not torch.equal(kept["s1_index"][0], kept["s1_index"][1])
    for row in range(2):
        mine = {name: value[row : row + 1] for name, value in inputs.items()}
        gone = {layer: dropped(kept[name][row], *SPAN) for layer, name in ((1, "s0_index"), (3, "s1_index"))}
        want = anew(model, mine, got.tokens[row : row + 1], gone)
        assert error([one[row] for one in got.logits], [one[0] for one in want]) < 1e-4


def test_tokens_that_go_in_groups():
    """Of five, as a merger in front of the decoder makes them; a bias by distance is counted for each token."""
    model, embeds = model_of("Bloom", n_layer=2)
    inputs = {"inputs_embeds": embeds}
    groups = tokcompile.Reduction(block=1, place="block", n=5, k=2, unit=5, prefix=SPAN[0], suffix=LENGTH - SPAN[1])
    prefill = tokcompile.optimize(Prefill(model), kwargs=inputs, plan=tokcompile.Plan("random", (groups,), outputs="reduced"))
    generator = Generator(prefill, model, max_new_tokens=4)
    assert [s.length for s in generator.wiring.stages] == [LENGTH, LENGTH - 15]
    got = generator(**inputs, eos=(), keep_logits=True)
    kept = run(prefill, **inputs).kept["s0_index"][0]
    gone = dropped([5 * int(group) + i for group in kept for i in range(5)], *SPAN)
    assert error(got.logits, anew(model, inputs, got.tokens, {1: gone})) < 1e-4


def test_without_a_reduction_it_is_the_models_own_generation():
    model, embeds = model_of("Mpt")
    inputs = {"inputs_embeds": embeds}
    prefill = prefill_of(model, inputs, budget=1.0)
    want = run(model.generate, **inputs, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert Generator(prefill, model, max_new_tokens=COUNT)(**inputs, eos=()).tokens.tolist() == want.tolist()


@pytest.mark.matrix
def test_the_files_generate_the_same(tmp_path):
    model, embeds = model_of("Bloom")
    prefill = prefill_of(model, {"inputs_embeds": embeds}, where=[2])
    report = export(prefill, model, tmp_path / "folder", max_new_tokens=8, verify_tokens=8)
    assert report.steps == 8
    assert report.error < 1e-5


def refused(error, match, name, **options):
    model, embeds = model_of(name, **options)
    prefill = prefill_of(model, {"inputs_embeds": embeds}, where=[2])
    with pytest.raises(error, match=match) as caught:
        Generator(prefill, model, max_new_tokens=COUNT)
    assert "what to do: " in str(caught.value)


def test_a_window_that_is_counted_from_the_end_of_the_buffer_is_refused():
    refused(TraceError, "gives a token other logits after what is in a static buffer", "GPTNeo", **GPT_NEO)


def test_tables_that_grow_with_the_text_are_refused_where_they_do():
    """Rotary positions are scaled anew from token 60 on."""
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    refused(
        TraceError, r"token 0 is not decoded as token 31 is: .*\(modeling_rope_utils.py", "Llama",
        **DECODER | dict(rope_parameters=rope, max_position_embeddings=60),
    )  # fmt: skip


def test_new_positions_are_refused():
    model, embeds = model_of("Falcon")
    prefill = prefill_of(model, {"inputs_embeds": embeds}, where=[2], renumber=True)
    with pytest.raises(InputError, match="optimize with renumber=False"):
        Generator(prefill, model, max_new_tokens=COUNT)


def test_an_op_over_the_entries_that_cannot_be_shortened_is_named(monkeypatch):
    from tokcompile.passes import rewrite

    model, embeds = model_of("Falcon")
    prefill = prefill_of(model, {"inputs_embeds": embeds}, where=[2])
    monkeypatch.delitem(rewrite.RULES, "aten.scaled_dot_product_attention")
    with pytest.raises(UnsupportedGraph) as caught:
        Generator(prefill, model, max_new_tokens=4)
    message = str(caught.value)
    assert message.startswith("this model cannot be decoded after a reduced prefill: ")
    for part in (
        "node: scaled_dot_product_attention_2 = ",
        "module: model.transformer.h.2.self_attention",
        "modeling_falcon.py:",
    ):
        assert part in message
    assert "what to do: nothing yet; the prefill alone can be optimized and exported" in message


def test_without_weights_it_is_not_known_whether_it_decodes():
    with torch.device("meta"):
        model, embeds = (
            build("BloomForCausalLM", "BloomConfig", MODELS["Bloom"], lambda batch: {}, 1)[0],
            torch.empty(1, 40, 48),
        )
    prefill = prefill_of(model, {"inputs_embeds": embeds}, where=[2])
    with pytest.raises(InputError, match="load its weights"):
        Generator(prefill, model, max_new_tokens=4)
