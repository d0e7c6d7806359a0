"""Decoders whose later layers attend to the keys of earlier ones, and take inputs of their own made from ids."""

import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import seeded, tokens
from tests.models.hf_base import DECODER, class_of
from tokcompile.llm import Generator, Prefill

SPAN = (4, 20)
SIZES = DECODER | dict(
    head_dim=12, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16, num_kv_shared_layers=2,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
)  # fmt: skip
MODELS = {
    "Gemma3n": dict(laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4),
    "Gemma4": dict(global_head_dim=12),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
def test_equals_keys_that_nobody_sees(name):
    """The last two layers attend to keys of layers 0 and 1: dropped at layer 1, tokens are still there for the third."""
    with seeded():
        config = class_of(f"{name}TextConfig")(**SIZES, **MODELS[name])
        model = shake(class_of(f"{name}ForCausalLM")(config).eval())
    ids = tokens(1, 24, 60)
    options = dict(method="random", budget=tokcompile.Tokens(9), where=[1], spans=[SPAN], outputs="reduced")
    prefill = tokcompile.optimize(Prefill(model), kwargs=dict(input_ids=ids), **options)
    gone = dropped(run(prefill, input_ids=ids).kept["s0_index"][0], *SPAN)
    generator = Generator(prefill, model, max_new_tokens=8)
    made = generator(input_ids=ids, eos=(), keep_logits=True)
    assert [s.length for s in generator.wiring.stages] == [24, 17]
    text = torch.cat([ids, made.tokens], 1)
    for step, logits in enumerate(made.logits):
        with hidden(gone, {1, 3}) as calls:
            want = run(model, input_ids=text[:, : 24 + step], use_cache=False).logits[:, -1]
        assert calls == [24 + step] * 4
        assert error(logits, want) < 1e-5


def test_without_a_reduction_it_is_the_models_own_generation():
    with seeded():
        model = shake(class_of("Gemma4ForCausalLM")(class_of("Gemma4TextConfig")(**SIZES, **MODELS["Gemma4"])).eval())
    ids = tokens(1, 24, 60)
    prefill = tokcompile.optimize(Prefill(model), kwargs=dict(input_ids=ids), budget=1.0, spans=[SPAN], outputs="reduced")
    made = Generator(prefill, model, max_new_tokens=12)(input_ids=ids, eos=())
    want = run(model.generate, ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(made.tokens, want[:, 24:])
