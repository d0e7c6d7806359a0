"""Decoders in which some layers mix tokens along the sequence (short convolutions, linear attention, state spaces), against
transformers' own layers and caches, called with fewer tokens from a layer on."""

import contextlib

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import assert_equal, error, run
from tests.llm.by_hand import cache_of
from tests.models import shake
from tests.models.family import noise
from tests.models.hf_base import DECODER, build
from tokcompile import ExportError, InputError
from tokcompile.llm import Generator, Prefill, export, load
from tokcompile.passes.calls import is_mixer, marks
from tokcompile.vlm.vision import with_places

LENGTH, SPAN, COUNT = 40, (5, 30), 8
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=12)
STATES = dict(mamba_n_heads=8, mamba_d_head=12, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
MIXED = {
    "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False)),
    "qwen3_5": ("Qwen3_5", dict(layer_types=["linear_attention", "full_attention"] * 2, head_dim=12, **DELTA)),
    "granite": (
        "GraniteMoeHybrid",
        dict(layer_types=["mamba", "attention"] * 2, num_local_experts=0, shared_intermediate_size=96, **STATES),
    ),
    "falcon_h1": ("FalconH1", dict(mamba_d_ssm=96, **STATES)),
}


def model_of(name, batch=1):
    family, options = MIXED[name]
    config = "Qwen3_5TextConfig" if name == "qwen3_5" else f"{family}Config"
    model, _, _ = build(f"{family}ForCausalLM", config, DECODER | options, lambda batch: {}, batch)
    return shake(model), noise(batch, LENGTH, 48)


def prefill_of(model, embeds, method="random", block=0, k=11, **options):
    return tokcompile.optimize(
        Prefill(model), kwargs={"inputs_embeds": embeds}, method=method, budget=tokcompile.Tokens(k), spans=[SPAN],
        where=[block], outputs="reduced", **options,
    )  # fmt: skip


def rows_of(prefill, embeds):
    """(B, rows) the original positions of the tokens that are left."""
    batch, kept = len(embeds), run(prefill, inputs_embeds=embeds).kept
    kept = kept["s0_index"] + SPAN[0] if kept else torch.empty(batch, 0, dtype=torch.long)
    before, after = torch.arange(SPAN[0]).expand(batch, -1), torch.arange(SPAN[1], LENGTH).expand(batch, -1)
    return torch.cat([before, kept, after], 1)


@contextlib.contextmanager
def cut_at(model, layer, rows):
    """From a layer on, transformers' own layers are given these tokens of a prompt only."""

    def take(x):
        return torch.stack([x[b if len(x) > 1 else 0][row] for b, row in enumerate(rows)])

    def hook(module, args, kwargs):
        (hidden, *rest) = args
        if hidden.shape[1] == LENGTH:
            hidden = take(hidden)
        if hidden.shape[1] == rows.shape[1]:
            tables = kwargs.get("position_embeddings")
            kwargs = kwargs | {"attention_mask": None, "position_embeddings": tables and tuple(map(take, tables))}
        return (hidden, *rest), kwargs

    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in layers[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model, embeds, layer, rows):
    """(tokens, logits) from transformers' own layers and cache."""
    from transformers import DynamicCache

    cached = {cache_of(model): DynamicCache(config=model.config)}
    with cut_at(model, layer, rows):
        logits = [run(model, inputs_embeds=embeds, use_cache=True, **cached).logits[:, -1]]
        for step in range(COUNT - 1):
            where = torch.full((len(embeds), 1), LENGTH + step)
            token = logits[-1].argmax(-1, keepdim=True)
            out = run(model, input_ids=token, position_ids=where, use_cache=True, **cached)
            logits.append(out.logits[:, -1])
    return torch.stack([one.argmax(-1) for one in logits], 1), logits


@pytest.mark.every(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.matrix] * (n == "qwen3_5")) for n in MIXED])
def test_equals_the_models_own_layers_and_caches(name):
    model, embeds = model_of(name, batch=2)
    prefill = prefill_of(model, embeds, **{"falcon_h1": dict(block=2, k=1), "granite": dict(k=0)}.get(name, {}))
    layer = int(prefill.plan.reductions[0].path.split(".")[-1])
    tokens, logits = by_hand(model, embeds, layer, rows_of(prefill, embeds))
    got = Generator(prefill, model, max_new_tokens=COUNT)(inputs_embeds=embeds, eos=(), keep_logits=True)
    assert got.tokens.tolist() == tokens.tolist()
    assert error(got.logits, logits) < 1e-4
    assert [int(path.split(".")[3]) for path in prefill.report.traced_again] == mixing(model, layer)
    assert not prefill.report.recoveries


def test_a_mixer_deep_inside_of_a_layer_that_attends():
    """Zamba 2, of one layer: as the model itself is over fewer tokens at their positions."""
    from transformers import DynamicCache

    sizes = dict(mamba_d_state=8, mamba_headdim=12, mamba_ngroups=1, n_mamba_heads=8, chunk_size=40, num_mem_blocks=1)
    shared = dict(attention_hidden_size=96, attention_head_dim=24, num_key_value_heads=4, use_mem_rope=True, adapter_rank=8)
    options = DECODER | sizes | shared | dict(num_hidden_layers=1, layers_block_type=["hybrid"])
    model = shake(build("Zamba2ForCausalLM", "Zamba2Config", options, lambda batch: {}, 1)[0])
    embeds = noise(1, LENGTH, 48)
    prefill = prefill_of(model, embeds)
    assert prefill.report.traced_again == ["model.model.layers.0.mamba_decoder.mamba"]
    made = Generator(prefill, model, max_new_tokens=3)(inputs_embeds=embeds, eos=(), keep_logits=True)
    where = rows_of(prefill, embeds)
    given, cached = dict(inputs_embeds=embeds[:, where[0]]), {cache_of(model): DynamicCache(config=model.config)}
    for step, logits in enumerate(made.logits):
        want = run(model, **given, position_ids=where, use_cache=True, **cached).logits[:, -1]
        assert error(logits, want) < 1e-4
        given, where = dict(input_ids=made.tokens[:, step : step + 1]), torch.tensor([[LENGTH + step]])


def mixing(model, layer):
    """The layers from one on that mix along the sequence."""
    return [i for i, one in enumerate(model.model.layers) if i >= layer and any(map(is_mixer, one.children()))]


@pytest.mark.parametrize("name", ["lfm2", "granite"])
def test_without_a_reduction_it_is_the_models_own_generation(name):
    model, embeds = model_of(name)
    inputs = {"inputs_embeds": embeds}
    prefill = tokcompile.optimize(Prefill(model), kwargs=inputs, method="random", budget=1.0, spans=[SPAN])
    assert not marks(prefill.graph_module.graph)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    want = run(
        model.generate, **inputs, attention_mask=mask, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert Generator(prefill, model, max_new_tokens=COUNT)(**inputs, eos=()).tokens.tolist() == want.tolist()


def test_tokens_in_another_order_are_put_in_order_for_such_a_layer():
    def keep(descending):
        def plan(tokens, site):
            index = torch.arange(0, site.n, 2)[: site.k].flip(0) if descending else torch.arange(0, site.n, 2)[: site.k]
            return tokcompile.Keep(index.expand(tokens.x.shape[0], -1), ordered=not descending)

        return tokcompile.Recipe(f"every_other_{descending}", plan)

    model, embeds = model_of("lfm2", batch=2)
    ascending, descending = (prefill_of(model, embeds, keep(down)) for down in (False, True))
    want, got = (run(opt, inputs_embeds=embeds) for opt in (ascending, descending))
    assert not descending.report.recoveries
    assert torch.equal(got.kept["s0_index"], want.kept["s0_index"].flip(1))
    assert error(got.output["logits"], want.output["logits"]) < 1e-5


def test_padding_is_hidden_from_such_a_layer_too():
    model, embeds = model_of("lfm2", batch=2)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[:, :3] = 0
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    prefill = tokcompile.optimize(
        Prefill(model), kwargs=inputs, method="random", budget=tokcompile.Tokens(11), spans=[SPAN], where=[0], outputs="reduced"
    )
    other = embeds.clone()
    other[:, :3] = 7.0
    want, got = run(prefill, **inputs), run(prefill, **{**inputs, "inputs_embeds": other})
    assert error(got.output["logits"], want.output["logits"]) < 1e-5


def test_flops_are_those_of_the_shorter_sequence():
    from torch.utils.flop_counter import FlopCounterMode

    model, embeds = model_of("lfm2")
    model.set_attn_implementation("eager")  # fused attention is not counted on the CPU
    prefill = prefill_of(model, embeds)
    with FlopCounterMode(display=False) as counter:
        run(prefill, inputs_embeds=embeds)
    assert counter.get_total_flops() == pytest.approx(prefill.report.flops, rel=0.02)
    budget = tokcompile.Flops(0.8)
    options = dict(method="random", budget=budget, spans=[SPAN], where=[0], outputs="reduced")
    solved = tokcompile.optimize(Prefill(model), kwargs={"inputs_embeds": embeds}, **options)
    assert 0.77 < solved.report.flops_ratio <= 0.8


def test_both_oracles_see_through_such_a_layer():
    model, embeds = model_of("lfm2")
    found = tokcompile.check(model, (), {"inputs_embeds": embeds, "use_cache": False}, spans=[SPAN])
    assert found.ok, str(found)
    assert not any("recover" in row.note for row in found.results)
    assert any("before tokens are mixed along the sequence" in row.note for row in found.results)


def test_a_wrong_result_of_such_a_layer_is_seen(monkeypatch):
    from tokcompile.passes import mixers

    model, embeds = model_of("lfm2")
    monkeypatch.setattr(mixers, "orders", lambda rw, axis: (None, None))
    found = tokcompile.check(model, (), {"inputs_embeds": embeds, "use_cache": False}, spans=[SPAN])
    assert not found.ok


def test_a_program_without_its_model_gives_tokens_back(tmp_path):
    model, embeds = model_of("lfm2")
    inputs = {"inputs_embeds": embeds, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
    options = dict(method="random", budget=tokcompile.Tokens(11), spans=[SPAN], where=[0])
    with pytest.raises(tokcompile.UnsupportedGraph, match="pass the model itself"):
        tokcompile.optimize(program, (), inputs, **options)
    with pytest.raises(ExportError, match=r"traced again over fewer tokens.*\n  what to do: torch.export.save"):
        tokcompile.optimize(model, (), inputs, **options).save(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    plain = tokcompile.optimize(model, (), inputs, method="random", budget=1.0, spans=[SPAN])
    plain.save(tmp_path / "plain.pt2")
    assert_equal(run(tokcompile.load(tmp_path / "plain.pt2"), **inputs), run(model, **inputs))


def test_the_files_generate_the_same(tmp_path):
    model, embeds = model_of("lfm2")
    prefill = prefill_of(model, embeds)
    export(prefill, model, tmp_path / "folder", max_new_tokens=COUNT)
    want = Generator(prefill, model, max_new_tokens=COUNT)(inputs_embeds=embeds, eos=())
    assert load(tmp_path / "folder", threads=1)(inputs_embeds=embeds, eos=()).tokens.tolist() == want.tokens.tolist()


@pytest.mark.matrix
def test_a_whole_vision_language_model(tmp_path):
    """LFM2-VL: reduced in the tower, whose method leaves tokens in another order, and taken apart for generation."""
    from tests.conftest import build as family

    model, _, kwargs = family("hf/lfm2_vl")
    whole = tokcompile.optimize(model, kwargs=kwargs, method="tome", budget=0.5)
    assert len(whole.report.traced_again) == 2
    assert not whole.report.recoveries
    parts = tokcompile.vlm.split(model, kwargs)
    vision = tokcompile.optimize(*parts.vision, method="tome", budget=0.5, outputs="reduced")
    with pytest.raises(InputError, match="mixes tokens along the sequence, and would read the padding"):
        tokcompile.vlm.split(model, kwargs, padded=True)
    short = parts.after(vision)
    before, seen = parts.see(kwargs["pixel_values"]), short.see(kwargs["pixel_values"])
    assert seen["kept"].tolist() == [sorted(seen["kept"][0].tolist())]
    assert before["features"].shape[1] == 2 * seen["features"].shape[1]
    alone = run(with_places(short), kwargs["pixel_values"])
    assert torch.equal(alone.kept["kept"], seen["kept"])
    assert torch.equal(alone.output["features"], seen["features"])
    prefill = tokcompile.optimize(
        *short.language, method="random", budget=tokcompile.Tokens(4), where=[1], spans=short.spans, outputs="reduced"
    )
    tokcompile.vlm.export(short, prefill, tmp_path / "folder", max_new_tokens=4)
    want = tokcompile.vlm.Generator(short, prefill, max_new_tokens=4)(kwargs["pixel_values"], kwargs["input_ids"], eos=())
    got = tokcompile.vlm.load(tmp_path / "folder", threads=1)(kwargs["pixel_values"], kwargs["input_ids"], eos=())
    assert got.tokens.tolist() == want.tokens.tolist()
