"""Every family of models through the oracles: what works, what works at a price, what is refused and how.

The results go to build/support.json; `python tools/support_table.py` prints them as the table of the README.
"""

import re

import pytest
import torch

import tokcompile
from tests.conftest import build, leaves, run, traced
from tests.models import FAMILIES
from tests.models.prompts import PROMPTS
from tokcompile import Tokens, oracles
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.trace import from_program

# Tokens are given back inside the blocks (windows, strided or grouped stages): only on request, since it costs the gain.
ANYWHERE = [
    "timm/caformer",
    "timm/davit",
    "timm/gcvit",
    "timm/levit",
    "timm/maxvit",
    "timm/nest",
    "timm/pit",
    "timm/pvt_v2",
    "timm/samvit",
    "timm/swin",
    "timm/swinv2",
    "timm/twins_pcpvt",
    "timm/twins_svt",
    "timm/volo",
    "hf/groupvit_vision",  # divides sums of tokens by their number and one
    "timm/xcit",
    "hf/eomt",
    "hf/mllama",
    "hf/pvt",
    "hf/sam_vision",
    "hf/segformer",
    "hf/swin",
    "hf/timesformer",
    "hf/vitdet",
    "torchvision/swin",
]

# No reduction is possible; each says why.
REFUSED = {
    "timm/mixer": "no residual attention block was found",
    "timm/coat": "no residual attention block was found",
    "timm/mvitv2": "no residual attention block was found",
    "timm/visformer": "its tokens lie on two axes",
    "timm/tiny_vit": "its tokens lie on two axes",
}

# Where only the user can know which positions are visual.
DECODERS = [
    "hf/gemma",
    "hf/gemma2",
    "hf/gemma3_text",
    "hf/gpt2",
    "hf/gpt_oss",
    "hf/llama",
    "hf/llama_cache",
    "hf/llama_eager",
    "hf/llama_padded",
    "hf/mistral",
    "hf/mixtral",
    "hf/phi",
    "hf/qwen2",
    "hf/qwen3",
    "hf/qwen3_moe",
]

# Differences from the eager model: a mask that hides nothing is dropped, so that another attention kernel runs.
ROUNDING = {"hf/clipseg": 1e-3, "hf/depth_anything": 1e-4}

SUPPORTED = [name for name in FAMILIES if name not in REFUSED]

# At batch 3 the first block, by all oracles, of families where samples are hard to tell apart; the others with -m matrix.
HARD = [
    "timm/cait",
    "timm/convit",
    "timm/naflexvit_masked",
    "timm/samvit",
    "timm/xcit",
    "hf/llama_padded",
    "hf/pixtral_vision",
    "hf/siglip2_vision",
    "hf/timesformer",
    "hf/vit_mae",
]
# Models of which others here have the same parts, and those that take longest and that other tests run too: with -m matrix.
RARE = [
    "timm/caformer",
    "timm/crossvit",
    "timm/davit",
    "timm/deepseek_vit",
    "timm/gcvit",
    "timm/gemma4_vit",
    "timm/levit",
    "timm/maxvit",
    "timm/naflexvit_resized",
    "timm/nest",
    "timm/pvt_v2",
    "timm/qwen3_vit",
    "timm/qwen3_vit_merge",
    "timm/swinv2",
    "timm/swinv2_cr",
    "timm/tnt",
    "timm/twins_pcpvt",
    "timm/twins_svt",
    "timm/vit_diff_attention",
    "timm/vit_parallel_diff",
    "timm/vit_parallel_things",
    "timm/vit_pe_core",
    "timm/vit_relpos_cls",
    "timm/vit_rope_mixed",
    "timm/vit_rope_reg",
    "timm/vitamin",
    "timm/volo",
    "hf/aimv2_vision",
    "hf/aya_vision",
    "hf/beit_segmentation",
    "hf/blip_vision",
    "hf/clip_vision_projection",
    "hf/clipseg",
    "hf/data2vec_vision",
    "hf/deit_distilled_classifier",
    "hf/dinov2_backbone",
    "hf/dinov2_classifier",
    "hf/eomt",
    "hf/gemma2",
    "hf/gemma4",
    "hf/glm4v",
    "hf/gpt_oss",
    "hf/groupvit_vision",
    "hf/hiera",
    "hf/hunyuan_vl",
    "hf/idefics2",
    "hf/idefics3",
    "hf/idefics3_vision",
    "hf/internvl",
    "hf/kimi_k25",
    "hf/layoutlmv3",
    "hf/lfm2_vl",
    "hf/llama4_vision",
    "hf/llama_cache",
    "hf/llava",
    "hf/llava_next",
    "hf/llava_onevision",
    "hf/lw_detr_backbone",
    "hf/mistral3",
    "hf/mixtral",
    "hf/mlcd_vision",
    "hf/mllama",
    "hf/owlvit_vision",
    "hf/paligemma",
    "hf/pi0",
    "hf/pvt",
    "hf/qwen2_5_vl",
    "hf/qwen2_5_vl_two_images",
    "hf/qwen2_vl",
    "hf/qwen3_moe",
    "hf/qwen3_vl",
    "hf/qwen3_vl_moe",
    "hf/qwen3_vl_vision",
    "hf/radio",
    "hf/rf_detr_backbone",
    "hf/siglip2_vision",
    "hf/smolvlm",
    "hf/video_llama_3",
    "hf/vit_masked_image",
    "hf/vit_msn",
    "hf/vitpose_backbone",
    "hf/vivit",
    "hf/vjepa2",
    "torchvision/swin",
]
APART = {"hf/hunyuan_vl", "hf/kimi_k25", "hf/lfm2_vl"}  # of several images each is rearranged by itself
NOTES = {
    "hf/hunyuan_vl": "in batches, where each image is rearranged by itself",
    "hf/kimi_k25": "in batches, where each image is rearranged by itself",
    "hf/lfm2_vl": "in batches, where each image is rearranged by itself",
    "hf/mllama": "behind the tower, where padding is cut off tile by tile",
}
FIRST_SITE = {"timm/levit": 1, "timm/swinv2_cr": 2, "timm/tnt": 1, "timm/crossvit": 1}

WHY = {
    "it views": "windows or a grid inside the blocks",
    "it writes at positions": "image features are written into the prompt",
    "it joins groups of tokens": "time and space take turns",
    "it gives positions of tokens": "tokens are grouped by argmax",
    "it handles each token by itself": "images are handled one by one",
    "it takes some of the samples": "images are handled one by one",
    "it cuts through the reduced tokens": "images are handled one by one",
    "it reads tokens by their place on the grid": "windows or a grid inside the blocks",
    "it adds up all tokens": "sums of tokens over their number and one",
}


def price(check: tokcompile.Check) -> str:
    """What tokens have to be given back for inside the blocks."""
    notes = " ".join(r.note for r in check.results if "recover='anywhere'" in r.note)
    return ", ".join(text for words, text in WHY.items() if words in notes)


def record(record_property, name: str, batch: int, verdict: str, text: str = "") -> None:
    row = dict(family=name, library=FAMILIES[name].library, batch=batch, verdict=verdict, note=text)
    record_property("support", row)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((n, 1) for n in SUPPORTED if n not in RARE),
        *((n, 3) for n in HARD),
        *(pytest.param(n, 1, marks=pytest.mark.matrix) for n in RARE),
        *(pytest.param(n, 3, marks=pytest.mark.matrix) for n in SUPPORTED if n not in HARD),
    ],
    ids=lambda v: f"batch{v}" if isinstance(v, int) else v,
)
def test_the_oracles_agree(name, batch, record_property, monkeypatch):
    program, _ = traced(name, batch)
    first, places = FIRST_SITE.get(name, 0), oracles.places
    blocks = None if batch == 1 else [first]
    if batch == 1:
        monkeypatch.setattr(oracles, "ORACLES", (oracles.permutation, oracles.masked_keys))
    if batch == 1 and name in HARD and name not in ANYWHERE:
        monkeypatch.setattr(oracles, "places", lambda *a: [b for b in places(*a) if b.index != first] or places(*a))
    check = tokcompile.check(program, spans=[(5, 30)] if name in DECODERS else None, blocks=blocks)
    recovers = any("recover='anywhere'" in r.note for r in check.results)
    verdict = "no" if not check.ok else "recover='anywhere'" if recovers else "yes"
    note = price(check) if check.ok else check.errors[0].splitlines()[0]
    note = NOTES.get(name, note) if recovers else note
    record(record_property, name, batch, verdict, note)
    assert check.ok, str(check)
    assert len({r.oracle for r in check.results}) == len(oracles.ORACLES)
    assert all(r.error is not None or (name, r.oracle) == ("timm/convit", "copies") for r in check.results)
    assert recovers == (name in ANYWHERE or (batch == 3 and name in APART)) or (batch == 3 and not recovers), str(check)
    assert bool(price(check)) == recovers


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PROMPTS)
def test_image_tokens_are_reduced_in_the_language_model(name):
    spans = PROMPTS[name]
    fast = tokcompile.optimize(traced(name)[0], method="random", budget=Tokens(7), where=[-2])
    assert [(r.prefix, r.prefix + r.n) for r in fast.plan.reductions] == spans
    assert sum(r.k for r in fast.plan.reductions) == 7
    assert all(re.search(r"(language|text)_model\.layers\.2$", r.path) for r in fast.plan.reductions)
    assert not [r for r in fast.report.recoveries if r["inside"]]


@pytest.mark.every(2)
@pytest.mark.parametrize("name", sorted({*HARD, *ROUNDING}))
def test_the_canonical_graph_equals_the_model(name):
    program, guards = traced(name)
    flat = from_program(program, *program.example_inputs, None, guards)
    got = leaves(run(canonicalise(flat.gm, flat.inputs), *flat.inputs))
    want = build(name)()
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=ROUNDING.get(name, 5e-6) * max(1.0, float(w.abs().max())))


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_a_refusal_says_why(name, reason, record_property):
    program, _ = traced(name)
    assert not tokcompile.check(program).ok
    with pytest.raises(tokcompile.UnsupportedGraph, match=reason) as refusal:
        tokcompile.optimize(program, method="random")
    record(record_property, name, 1, "no", refusal.value.reason)


def test_the_tables_name_families():
    assert {*ANYWHERE, *REFUSED, *DECODERS, *ROUNDING, *PROMPTS} <= set(FAMILIES)
    assert not set(REFUSED) & {*ANYWHERE, *DECODERS, *PROMPTS}
