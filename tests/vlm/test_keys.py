"""Keys as methods read them: before position is rotated into them, also where positions are an input and where each key head
serves a group of queries."""

import pytest

import tokcompile
from tests.conftest import run
from tests.vlm.models import parts_of, vlm


def largest(tokens, site):
    """The tokens whose keys have the largest first channel, which rotation changes."""
    first = tokens.k[..., 0].mean(1)
    return tokcompile.Keep(first.topk(site.k, -1).indices.sort(-1).values)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_keys_are_those_of_the_projection(name):
    model, _ = vlm(name)
    parts = parts_of(name)
    probe = tokcompile.Recipe("probe", largest, taps=("x", "k"))
    opt = tokcompile.optimize(
        *parts.language, method=probe, budget=tokcompile.Tokens(5), where=[1], spans=parts.spans, outputs="reduced"
    )
    kept = run(opt, **parts.language.kwargs).kept["s0_index"][0]
    base, embeds = model.model.language_model, parts.language.kwargs
    given = {key: embeds[key] for key in ("inputs_embeds", "position_ids")}
    layer = base.layers[1]
    hidden = run(base, **given, attention_mask=parts.prompt.mask, output_hidden_states=True).hidden_states[1]
    keys = layer.self_attn.k_proj(layer.input_layernorm(hidden))[0].unflatten(-1, (2, -1))[..., 0].mean(-1)
    start, stop = parts.spans[0]
    assert kept.tolist() == sorted(keys[start:stop].topk(5).indices.tolist())
