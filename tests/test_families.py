"""Every family of models through both oracles: what works, what works at a price, what is refused and how.

The results go to build/support.json; `python tools/support_table.py` prints them as the table of the README.
"""

import functools

import pytest
import torch

import tokcompile
from tests.conftest import build, leaves, run
from tests.models import FAMILIES
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.trace import export, from_program

# Tokens are given back inside the blocks (windows, strided or grouped stages): only on request, since it costs the gain.
ANYWHERE = """
    timm/davit timm/gcvit timm/levit timm/maxvit timm/nest timm/pit timm/pvt_v2 timm/samvit timm/swin timm/swinv2
    timm/twins_pcpvt timm/twins_svt timm/volo timm/xcit hf/groupvit_vision hf/internvl hf/paligemma hf/pvt hf/sam_vision
    hf/segformer hf/swin hf/timesformer hf/vitdet torchvision/swin
""".split()

# No reduction is possible; each says why.
REFUSED = {
    "timm/mixer": "no residual attention block was found",
    "timm/coat": "no residual attention block was found",
    "timm/mvitv2": "no residual attention block was found",
    "timm/visformer": "its tokens lie on two axes",
    "timm/tiny_vit": "its tokens lie on two axes",
}

# Full vision-language models that are not supported yet: refused, whatever the reason, and never wrong.
NOT_YET = """
    hf/gemma3 hf/idefics3 hf/llava_onevision hf/qwen2_vl hf/qwen2_5_vl hf/qwen3_vl hf/smolvlm
""".split()

# Where only the user can know which positions are visual.
DECODERS = """
    hf/gemma hf/gemma2 hf/gpt2 hf/llama hf/llama_cache hf/llama_eager hf/llama_padded hf/mistral hf/phi hf/qwen2 hf/qwen3
""".split()

# Differences from the eager model: a mask that hides nothing is dropped, so that another attention kernel runs.
ROUNDING = {"hf/clipseg": 1e-3, "hf/depth_anything": 1e-4}

SUPPORTED = [name for name in FAMILIES if name not in REFUSED and name not in NOT_YET]
AT_BATCH_3 = [name for i, name in enumerate(SUPPORTED) if i % 2 or name in ANYWHERE or "vision" in name]


@functools.cache
def trace(name: str, batch: int):
    """The exported program, and the values that were fixed to export it."""
    return export(*build(name, batch))


def note(check: tokcompile.Check) -> str:
    """The first sentence that says what recovery inside the blocks was for."""
    return next((r.note.partition(": ")[2] for r in check.results if "recover='anywhere'" in r.note), "")


def record(record_property, name: str, batch: int, verdict: str, text: str = "") -> None:
    row = dict(family=name, library=FAMILIES[name].library, batch=batch, verdict=verdict, note=text)
    record_property("support", row)


@pytest.mark.parametrize(("name", "batch"), [(n, 1) for n in SUPPORTED] + [(n, 3) for n in AT_BATCH_3],
                         ids=lambda v: f"batch{v}" if isinstance(v, int) else v)  # fmt: skip
def test_the_oracles_agree(name, batch, record_property):
    """At batch 3 one block is enough, except where the blocks differ."""
    program, _ = trace(name, batch)
    blocks = None if batch == 1 or name in ANYWHERE else [1]
    check = tokcompile.check(program, spans=[(5, 30)] if name in DECODERS else None, blocks=blocks)
    recovers = any("recover='anywhere'" in r.note for r in check.results)
    verdict = "no" if not check.ok else "recover='anywhere'" if recovers else "yes"
    record(record_property, name, batch, verdict, note(check))
    assert check.ok, str(check)
    assert {r.oracle for r in check.results} == {"permutation", "masked keys"}
    assert all(r.error is not None for r in check.results if r.oracle == "permutation")
    assert verdict == ("recover='anywhere'" if name in ANYWHERE else "yes"), str(check)


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_canonical_graph_equals_the_model(name):
    program, guards = trace(name, 1)
    traced = from_program(program, *program.example_inputs, None, guards)
    got = leaves(run(canonicalise(traced.gm, traced.inputs), *traced.inputs))
    want = build(name)()
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=ROUNDING.get(name, 5e-6) * max(1.0, float(w.abs().max())))


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_a_refusal_says_why(name, reason, record_property):
    program, _ = trace(name, 1)
    assert not tokcompile.check(program).ok
    with pytest.raises(tokcompile.UnsupportedGraph, match=reason) as refusal:
        tokcompile.optimize(program, method="random")
    record(record_property, name, 1, "no", refusal.value.reason)


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_supported_yet_is_refused(name, record_property):
    with pytest.raises(tokcompile.TokcompileError) as refusal:
        tokcompile.optimize(*build(name), method="random")
    record(record_property, name, 1, "not yet", str(refusal.value).splitlines()[0])


def test_the_tables_name_families():
    assert {*ANYWHERE, *REFUSED, *NOT_YET, *DECODERS, *ROUNDING} <= set(FAMILIES)
    assert not set(NOT_YET) & {*ANYWHERE, *REFUSED, *DECODERS}
