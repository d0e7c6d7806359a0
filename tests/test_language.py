"""Reductions inside a language model against its own layers run by hand on the kept tokens, at their original positions."""

import copy

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import build, counts, error, run
from tests.reference.dart import dart
from tests.reference.topk import topk
from tokcompile import Tokens

LAYER, SPAN = 2, (5, 30)
DECODERS = ["hf/llama", "hf/qwen2", "hf/qwen3", "hf/mistral", "hf/phi", "hf/gemma"]


def recorded(monkeypatch):
    """The operands of every fused attention that runs from now on."""
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def record(query, key, *args, **kwargs):
        calls.append((query, key, kwargs.get("scale") or query.shape[-1] ** -0.5, kwargs["attn_mask"]))
        return fused(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    return calls


def kept_by_dart(calls, normed, k):
    _, key, *_ = calls[LAYER - 1]
    text = dict(start=SPAN[0], n=SPAN[1] - SPAN[0], text_pivots=4)
    return dart(key[0].numpy(), normed[0].numpy(), k, 4, **text)


def kept_by_fastv(calls, normed, k):
    query, key, scale, mask = calls[LAYER - 1]
    scores = (query * scale) @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    last = scores.masked_fill(~mask, float("-inf")).softmax(-1)[0, :, -1]
    return sorted(topk(last[:, slice(*SPAN)].numpy(), k))


def by_hand(model, embeds, keep, monkeypatch, k):
    """Layers before LAYER on everything, those from it on over what `keep` chooses; the kept positions beside it."""
    base = model.model
    calls = recorded(monkeypatch)
    positions = torch.arange(embeds.shape[1])[None]
    x, kept = embeds, None
    cos, sin = base.rotary_emb(x, positions)
    distance = positions[0, :, None] - positions[0]
    mask = (distance >= 0) & (distance < (getattr(base.config, "sliding_window", None) or x.shape[1]))
    for i, layer in enumerate(base.layers):
        if i == LAYER:
            norm = base.norm if hasattr(base, "norm") else base.final_layernorm
            kept = torch.tensor(keep(calls, norm(x), k))
            rows = torch.cat([torch.arange(SPAN[0]), kept + SPAN[0], torch.arange(SPAN[1], x.shape[1])])
            x, cos, sin, positions, mask = x[:, rows], cos[:, rows], sin[:, rows], positions[:, rows], mask[rows][:, rows]
        x = layer(x, attention_mask=mask[None, None], position_ids=positions, position_embeddings=(cos, sin))
        x = x[0] if isinstance(x, tuple) else x
    x = base.norm(x) if hasattr(base, "norm") else base.final_layernorm(x)
    return model.lm_head(x), kept


@pytest.mark.parametrize(("method", "keep"), [("dart", kept_by_dart), ("fastv", kept_by_fastv)])
@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_layers_run_by_hand(name, method, keep, family, program, monkeypatch):
    k = 11
    model, args, kwargs = family(name)
    optimized = tokcompile.optimize(program(name), method=method, budget=Tokens(k), spans=[SPAN], outputs="reduced")
    assert counts(optimized) == [(LAYER, SPAN[1] - SPAN[0], k)]
    out, extra = run(optimized, *args, **kwargs)
    logits = out["logits"] if "logits" in out else out[0]
    want, kept = run(by_hand, model, kwargs["inputs_embeds"], keep, monkeypatch, k)
    assert extra["s0_index"][0].tolist() == kept.tolist()
    assert logits.shape == want.shape
    assert error(logits, want) < 1e-5


@pytest.mark.parametrize("method", ["dart", "fastv", "random"])
def test_a_model_without_its_weights(method, family):
    model, _, kwargs = family("hf/llama")
    options = {"method": method, "budget": Tokens(11), "spans": [SPAN]}
    empty = copy.deepcopy(model).to("meta")
    bare = tokcompile.optimize(empty, kwargs={**kwargs, "inputs_embeds": kwargs["inputs_embeds"].to("meta")}, **options)
    assert bare.plan == tokcompile.optimize(model, kwargs=kwargs, **options).plan
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    ours = [b for name, b in bare.graph_module.named_buffers() if name.startswith("_tokcompile")]
    assert all(b.device.type == "cpu" for b in ours)  # what the pass adds is not lost with the weights


def test_all_go_from_a_layer_on(program, family):
    """Two images, both gone from layer 3 on; given back, they are what they were then."""
    model, _, kwargs = family("hf/llama", 2)
    given = dict(method="dart", budget=Tokens(11), spans=[(0, 15), (20, 30)], drop_layer=3)
    short = tokcompile.optimize(program("hf/llama", 2), outputs="reduced", **given)
    assert counts(short) == [(2, 15, 7), (2, 10, 4), (3, 7, 0), (3, 4, 0)]
    assert tokcompile.optimize(program("hf/llama", 2), plan=short.plan).plan == short.plan
    text = [*range(15, 20), *range(30, 40)]
    whole = run(tokcompile.optimize(program("hf/llama", 2), **given), **kwargs)["logits"]
    assert error(whole[:, text], run(short, **kwargs).output["logits"]) < 1e-6
    before = run(model, **kwargs, output_hidden_states=True).hidden_states[3]
    gone = run(tokcompile.optimize(program("hf/llama", 2), **{**given, "budget": 1.0}), **kwargs)["logits"]
    assert error(gone[:, :15], run(lambda: model.lm_head(model.model.norm(before[:, :15])))) < 1e-6


@pytest.mark.parametrize(("options", "message"), [
    (dict(drop_layer=2), "drop_layer=2 is block 2, and 'dart' reduces at block 2\n  what to do: a later layer"),
    (dict(drop_layer=4), "drop_layer's layer is one of the 4 blocks"),
    (dict(drop_layer=True), "drop_layer=True is neither the number of a layer nor a share"),
    (dict(drop_layer=3, spans=[(0, 40)]), "all tokens can be dropped only .* where text is left"),
    (dict(drop_layer=3, recover="never"), "recover='never' forbids giving them back"),
    (dict(budget={2: 9, 3: 0, 1: 0}), "block 2: 0 tokens come in, 9 cannot be left"),
], ids=str)  # fmt: skip
def test_what_cannot_all_go(options, message, program):
    with pytest.raises(tokcompile.TokcompileError, match=message):
        tokcompile.optimize(program("hf/llama"), **{"method": "dart", "budget": Tokens(11), "spans": [SPAN], **options})


@pytest.mark.parametrize(("outputs", "span", "message"), [
    ("reduced", (15, 40), "takes tokens of which none is left[\\s\\S]*slice[\\s\\S]*the last token of a prompt, out of"),
    ("keep", SPAN, "none is left to stand for them [\\s\\S]*self_attn[\\s\\S]*pass outputs='reduced'"),
])  # fmt: skip
def test_what_is_read_of_tokens_that_went(outputs, span, message, family):
    """The logits of the last token, and keys."""
    inputs = {"inputs_embeds": family("hf/llama").kwargs["inputs_embeds"]}
    prefill = tokcompile.llm.Prefill(family("hf/llama").model)
    with pytest.raises(tokcompile.UnsupportedGraph, match=message):
        tokcompile.optimize(prefill, kwargs=inputs, method="random", budget=1.0, drop_layer=2, spans=[span], outputs=outputs)


@pytest.mark.parametrize(("method", "name"), [("dart", "Dart"), ("fastv", "Fastv")])
def test_a_reduction_is_one_node_that_a_plugin_takes(method, name, program, tmp_path):
    optimized = tokcompile.optimize(program("hf/llama"), method=method, budget=Tokens(11), spans=[SPAN])
    report = optimized.export_onnx(tmp_path / "llama.onnx", target="tensorrt_rtx")
    assert report.nodes == {name: 1}
    assert [r["fused"] for r in report.reductions] == [True]


@torch.no_grad()
def test_sinks_take_their_share_of_the_attention_that_is_read():
    """GPT-OSS: to what the last token attends, beside the sinks, in the model's own numbers."""
    model, args, kwargs = build("hf/gpt_oss", 2)
    own = model(*args, **kwargs, output_attentions=True).attentions[LAYER - 1]
    want = own[:, :, -1, slice(*SPAN)].mean(1).topk(9).indices.sort().values
    fast = tokcompile.optimize(model, args, kwargs, method="fastv", budget=Tokens(9), spans=[SPAN], outputs="reduced")
    assert torch.equal(fast(*args, **kwargs).kept["s0_index"], want)


def test_a_last_token_that_is_padding_ranks_nothing():
    """As an example of a model that writes attention out, and later in one with fused attention."""
    left, right = torch.ones(2, 2, 40, dtype=torch.long)
    left[0, :3] = right[1, -2:] = 0
    options = dict(budget=Tokens(9), spans=[SPAN])
    model, _, kwargs = build("hf/llama", 2)
    fast = tokcompile.optimize(model, kwargs={**kwargs, "attention_mask": left}, method="vatp", **options)
    run(fast, **kwargs, attention_mask=left)
    match = r"the mask from attention_mask hides the last token.*'vatp' ranks\n  what to do: pad prompts on the left"
    with pytest.raises(tokcompile.InputError, match=match):
        run(fast, **kwargs, attention_mask=right)
    match = "(?s)in the example the mask from attention_mask.*'fastv'.*node: .*layers.1.*source: .*left"
    eager = build("hf/llama_eager", 2).model
    with pytest.raises(tokcompile.UnsupportedGraph, match=match):
        tokcompile.optimize(eager, kwargs={**kwargs, "attention_mask": right}, method="fastv", **options)


@torch.no_grad()
def test_padding_is_no_text_to_methods_that_read_text():
    """Wherever it stands, and whatever it holds."""
    model, _, kwargs = build("hf/llama", 2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = mask[0, 30:32] = mask[1, -5:] = 0
    padded = kwargs["inputs_embeds"] + 30 * torch.randn(2, 2, 40, 48) * (mask == 0)[..., None]
    kwargs = {**kwargs, "attention_mask": mask, "position_ids": torch.arange(40).expand(2, -1)}
    program = torch.export.export(model, (), kwargs, strict=False)
    for method in "dart", "sparsevlm", "dart_embeds":
        fast = tokcompile.optimize(program, method=method, budget=Tokens(9), spans=[SPAN], outputs="reduced")
        one, other = (fast(**{**kwargs, "inputs_embeds": embeds}).kept["s0_index"] for embeds in padded)
        assert torch.equal(one, other)
        assert not torch.equal(
            one, fast(**{**kwargs, "attention_mask": mask * 0 + 1, "inputs_embeds": padded[0]}).kept["s0_index"]
        )
