"""The methods inside a language model against its own layers run by hand, with each selection made by plain loops.

One sample at a time, on whatever tokens are left: kept tokens stay at their original positions (GAP), new ones at those of
the tokens that they are made of; or all are numbered anew from 0, as some methods are published.
"""

import numpy as np
import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.reference import aim, dart_embeds, evs, grid, m3, ppe, sparsevlm, vatp
from tests.reference.topk import topk
from tests.test_language import recorded
from tokcompile import Keep, Recipe, Tokens
from tokcompile.llm import Generator, Prefill
from tokcompile.methods.grid import sub_grid
from tokcompile.methods.sparsevlm import kept, recycled

SPAN = (5, 30)
N, TEXT = SPAN[1] - SPAN[0], 10  # the 40 tokens end with ten of text


class ByHand:
    """One prompt on its way through a decoder. x: (L, D). places: original positions of the tokens that lend each one its
    position, as many as it has. n: how many image tokens are left, from SPAN[0] on."""

    def __init__(self, model, embeds, calls, prompt):
        self.prompt = prompt
        self.base, self.calls = model.model, calls
        self.embeds = self.x = embeds
        self.places, self.n = [[i] for i in range(len(embeds))], N
        self.came_from = list(range(N))  # which image tokens those that are left stand for
        self.table = self.base.rotary_emb(embeds[None], torch.arange(len(embeds))[None])

    def rotary(self):
        """The tables of the tokens that are left: a frequency's share of the positions is where it is read."""
        out = []
        for table in self.table:
            width = table.shape[-1]
            frequency = [c % (width // 2) for c in range(width)]
            rows = [[table[0, p[f * len(p) // (width // 2)], c] for c, f in enumerate(frequency)] for p in self.places]
            out.append(torch.tensor(rows)[None])
        return tuple(out)

    def layer(self, number):
        """What a layer gives for the tokens that are left; its attention is recorded."""
        first = torch.tensor([p[0] for p in self.places])
        mask = first[:, None] >= first
        own = self.base.layers[number]
        self.values = own.self_attn.v_proj(own.input_layernorm(self.x)).unflatten(-1, (2, -1)).transpose(0, 1)
        x = self.base.layers[number](
            self.x[None], attention_mask=mask[None, None], position_ids=first[None], position_embeddings=self.rotary()
        )
        return (x[0] if isinstance(x, tuple) else x)[0]

    def scores(self, call):
        query, key, scale, mask = call
        scores = (query * scale) @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
        length = self.prompt - N + self.n
        return scores.masked_fill(~mask, float("-inf"))[0, :, :length, :length]

    @property
    def image(self):
        return slice(SPAN[0], SPAN[0] + self.n)

    def replace(self, rows, places):
        """The image tokens that are left become these, at these positions among them."""
        old, stop = self.places[self.image], SPAN[0] + self.n
        new = [[old[i][0] for i in many] if len(many) > 1 else old[many[0]] for many in places]
        self.x = torch.cat([self.x[: SPAN[0]], rows, self.x[stop:]])
        self.places = [*self.places[: SPAN[0]], *new, *self.places[stop:]]
        self.n = len(new)
        self.came_from = [self.came_from[many[0]] for many in places]

    def number_anew(self):
        self.places = [[i] for i in range(len(self.places))]

    def keep(self, chosen):
        self.replace(self.x[self.image][chosen], [[i] for i in chosen])


def pyramiddrop_by_hand(state, block, k, step):
    state.layer(block)
    last = state.scores(state.calls[-1]).softmax(-1)[:, -1, state.image]
    state.keep(sorted(topk(last.numpy(), k)))


def vatp_by_hand(state, block, k, step):
    last = state.scores(state.calls[-1]).softmax(-1)[:, -1, state.image]
    state.keep(vatp.vatp(last.numpy(), state.values[:, state.image].numpy(), k))


def sparsevlm_by_hand(state, block, k, step, recycle=0.3, per_cluster=10):
    text = state.embeds[state.prompt - TEXT : state.prompt].numpy()
    rows = sparsevlm.raters(state.embeds[slice(*SPAN)].numpy(), text)
    attention = state.scores(state.calls[-1]).softmax(-1)[:, -TEXT:, state.image]
    options = {"recycle": recycle, "per_cluster": per_cluster}
    count = kept(state.n, k, options)
    assert recycled(state.n - count, options)[1] == k - count
    x = state.x[state.image]
    chosen, new = sparsevlm.sparsevlm(attention.numpy(), rows, x.numpy(), count, recycle, per_cluster)
    made = [torch.from_numpy(np.stack(new)).float()] if new else []
    state.replace(torch.cat([x[chosen[:count]], *made]), [[i] for i in chosen])


def aim_by_hand(state, block, k, step):
    if block == 0:
        rows, places = aim.merge_to(state.x[state.image].numpy(), k)
        state.replace(torch.from_numpy(rows).float(), [[i] for i in places])
    else:
        state.keep(aim.prune(state.scores(state.calls[-1]).tolist(), SPAN[0], state.n, k, 0.1, 5))


def ppe_by_hand(state, block, k, step):
    rows, places = ppe.ppe(state.x[state.image].numpy(), k, *((8, 5) if step == 0 else (1, 3)))
    state.replace(torch.from_numpy(rows).float(), places)


def dart_embeds_by_hand(state, block, k, step):
    text = torch.cat([state.x[: SPAN[0]], state.x[SPAN[1] :]])
    state.keep(dart_embeds.dart_embeds(state.x[state.image].numpy(), text.numpy(), k, 4, 4))


def evs_by_hand(state, block, k, step):
    state.keep(evs.evs(state.x[state.image].numpy(), 5, k))


def grid_by_hand(state, block, k, step):
    state.keep(grid.grid(N, k, (5, 5)))


def m3_by_hand(state, block, k, step):
    cut = sub_grid(5, 5, k)
    rows = m3.m3(state.x[state.image].numpy(), (5, 5), *cut)
    edges = [[i * 5 // c for i in range(c + 1)] for c in cut]
    cells = [[y * 5 + x for y in range(*rows) for x in range(*columns)]
             for rows in zip(edges[0], edges[0][1:]) for columns in zip(edges[1], edges[1][1:])]  # fmt: skip
    state.replace(torch.from_numpy(rows).float(), [[cell[(len(cell) - 1) // 2]] for cell in cells])


CASES = {
    "pyramiddrop": (pyramiddrop_by_hand, dict(budget=Tokens(5)), [(1, 15), (2, 9), (3, 5)]),
    "vatp": (vatp_by_hand, dict(budget=Tokens(11)), [(2, 11)]),
    "sparsevlm": (sparsevlm_by_hand, dict(budget={1: 18, 3: 9}), [(1, 18), (3, 9)]),
    "aim": (aim_by_hand, dict(budget=Tokens(0)), [(0, 7), (2, 3), (3, 0)]),
    "ppe": (ppe_by_hand, dict(budget=0.45), [(0, 11)]),
    "ppe cascade": (ppe_by_hand, dict(budget={0: 14, 2: 6}), [(0, 14), (2, 6)]),
    "dart_embeds": (dart_embeds_by_hand, dict(budget=Tokens(11)), [(0, 11)]),
    "evs": (evs_by_hand, dict(budget=0.5, frames=5), [(0, 13)]),
    "grid": (grid_by_hand, dict(budget=Tokens(9), shape=(5, 5)), [(0, 9)]),
    "m3": (m3_by_hand, dict(budget=Tokens(9), shape=(5, 5)), [(0, 9)]),
}


def through_the_layers(model, embeds, choose, steps, monkeypatch, prompt=None, anew=()):
    """The logits of all tokens that are left, and the original positions of the image's, the first one of each; what comes
    after the prompt has no say in what is kept. anew: the steps after which all tokens get new positions."""
    state = ByHand(model, embeds, recorded(monkeypatch), prompt or len(embeds))
    for number in range(len(state.base.layers)):
        for step, (block, k) in enumerate(steps):
            if block == number:
                choose(state, block, k, step)
                if step in anew:
                    state.number_anew()
        state.x = state.layer(number)
    norm = state.base.norm if hasattr(state.base, "norm") else state.base.final_layernorm
    return model.lm_head(norm(state.x)), state.came_from


ANEW = {"pyramiddrop": (0, 1, 2), "sparsevlm": (0, 1), "aim": (0,)}  # after which of its steps tokens get new positions
ROTARY = ("pyramiddrop", "sparsevlm", "ppe")  # what reads, or changes, how positions enter: on more models


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("case", "name"), [*((c, "hf/llama") for c in CASES), *((c, m) for m in ("hf/qwen3", "hf/phi") for c in ROTARY)]
)
def test_equals_the_layers_run_by_hand(case, name, family, program, monkeypatch):
    choose, options, steps = CASES[case]
    model, args, kwargs = family(name, 2)
    method = case.split()[0]
    optimized = tokcompile.optimize(program(name, 2), method=method, spans=[SPAN], outputs="reduced", **options)
    assert [(r.block, r.place, r.k) for r in optimized.plan.reductions] == [(b, "block", k) for b, k in steps]
    out, extra = run(optimized, *args, **kwargs)
    logits = out["logits"] if "logits" in out else out[0]
    for b in range(2):
        with monkeypatch.context() as patch:
            anew = ANEW.get(case, ())
            want, places = run(through_the_layers, model, kwargs["inputs_embeds"][b], choose, steps, patch, anew=anew)
        assert (extra[f"s{len(steps) - 1}_index"][b].tolist() if steps[-1][1] else []) == places
        assert error(logits[b], want) < 1e-5


@pytest.mark.every(4)
@pytest.mark.parametrize("case", ["pyramiddrop", "sparsevlm", "aim", "ppe cascade"])
def test_the_onnx_file_equals_the_model(case, program, tmp_path):
    _, options, steps = CASES[case]
    optimized = tokcompile.optimize(program("hf/llama", 2), method=case.split()[0], spans=[SPAN], **options)
    report = optimized.export_onnx(tmp_path / "llama.onnx")  # compared in onnxruntime
    assert report.error < 1e-4
    assert sum(report.nodes.values()) == sum(k > 0 for _, k in steps)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", ["pyramiddrop", "sparsevlm", "aim", "ppe"])
def test_generation_goes_on_from_what_is_left(case, family, monkeypatch):
    """Greedy tokens of the decode graph against the prompt with the tokens so far, run anew without caches."""
    choose, options, steps = CASES[case]
    model, _, kwargs = family("hf/llama")
    inputs = {"inputs_embeds": kwargs["inputs_embeds"]}
    given = dict(method=case, spans=[SPAN], outputs="reduced", **options)
    made = Generator(tokcompile.optimize(Prefill(model), kwargs=inputs, **given), model, max_new_tokens=6)
    got = made(**inputs, eos=(), keep_logits=True)
    for t in range(1, 6):
        start = torch.cat([inputs["inputs_embeds"], model.model.embed_tokens(got.tokens[:, :t])], 1)
        with monkeypatch.context() as patch, torch.no_grad():
            want, _ = through_the_layers(model, start[0], choose, steps, patch, prompt=40, anew=ANEW.get(case, ()))
        assert int(want[-1].argmax()) == int(got.tokens[0, t])
        assert error(got.logits[t][0], want[-1]) < 1e-4


def test_the_order_of_tokens_means_nothing(family, program):
    """Masks and positions follow each token (GAP): in whatever order a method gives them, the text comes out the same."""

    def shuffled(tokens, site):
        return Keep(tokens.x[..., :11].mean(1).argsort(-1), ordered=False)

    def ascending(tokens, site):
        return Keep(shuffled(tokens, site).index.sort(-1).values)

    _, args, kwargs = family("hf/llama", 2)
    logits, kept_tokens = [], []
    for plan in (shuffled, ascending):
        recipe = Recipe("ordered", plan, place="block", steps=tokcompile.steps.once(0.5))
        optimized = tokcompile.optimize(
            program("hf/llama", 2), method=recipe, spans=[SPAN], budget=Tokens(11), outputs="reduced"
        )
        out, extra = run(optimized, *args, **kwargs)
        logits.append(out["logits"][:, -TEXT:])
        kept_tokens.append(extra["s0_index"])
    assert not torch.equal(*kept_tokens)
    assert error(*logits) < 1e-5


def test_two_images_each_with_the_text_after_it(family, program):
    """Each sample of a batch, and each image, decides for itself."""
    spans = [(3, 15), (18, 30)]
    for method, options in (("pyramiddrop", {}), ("sparsevlm", {"recycle": 0}), ("dart_embeds", {}), ("aim", {}), ("ppe", {})):
        given = dict(method=method, spans=spans, budget=Tokens(8), outputs="reduced", **options)
        _, args, kwargs = family("hf/llama", 2)
        out, extra = run(tokcompile.optimize(program("hf/llama", 2), **given), *args, **kwargs)
        alone = tokcompile.optimize(program("hf/llama"), **given)
        for b in range(2):
            one, one_extra = run(alone, inputs_embeds=kwargs["inputs_embeds"][b : b + 1], use_cache=False)
            assert [v[b].tolist() for v in extra.values()] == [v[0].tolist() for v in one_extra.values()]
            assert error(out["logits"][b], one["logits"][0]) < 1e-5


def test_positions_need_rotary_tables(program):
    with pytest.raises(tokcompile.UnsupportedGraph, match=r"(?s)gives each token several positions.*positions=1"):
        tokcompile.optimize(program("hf/gpt2"), method="ppe", spans=[SPAN], budget=0.5)
    with pytest.raises(tokcompile.UnsupportedGraph, match=r"(?s)12 channels does not hold 7 frequencies.*add up to 6"):
        tokcompile.optimize(program("hf/llama"), method="ppe", spans=[SPAN], budget=0.5, sections=(4, 3))


def test_text_decides_in_sparsevlm_but_not_in_evs(family, program):
    """Other words after the image: other tokens are kept only where they are asked."""
    _, args, kwargs = family("hf/llama")
    other = {**kwargs, "inputs_embeds": torch.cat([kwargs["inputs_embeds"][:, :30], torch.randn(1, TEXT, 48)], 1)}
    for method, options in (("sparsevlm", {}), ("evs", {"frames": 5})):
        optimized = tokcompile.optimize(
            program("hf/llama"), method=method, spans=[SPAN], outputs="reduced", budget=0.5, **options
        )
        kept_here, kept_there = (run(optimized, *args, **given).kept["s0_index"] for given in (kwargs, other))
        assert torch.equal(kept_here, kept_there) == (method == "evs")


def three_axes():
    """A text model of Qwen2.5-VL whose image tokens stand on three axes, and its inputs."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    tokens = dict(vocab_size=64, bos_token_id=0, eos_token_id=63)
    config = Qwen2_5_VLTextConfig(**sizes, **tokens, rope_scaling={**rope, "type": "mrope"}, rope_parameters=rope)
    model = Qwen2_5_VLTextModel(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    places = torch.arange(40).repeat(3, 1, 1)
    places[:, :, 5:30] = torch.stack([torch.full((25,), 5), 5 + torch.arange(25) // 5, 5 + torch.arange(25) % 5])[:, None]
    return model, {"inputs_embeds": torch.randn(1, 40, 64), "position_ids": places}


@pytest.mark.parametrize("positions", [1, 2, 3, 8])
def test_several_positions_on_three_axes(positions):
    model, inputs = three_axes()
    options = dict(budget=0.45, positions=positions, sections=(2, 3, 3))
    given = dict(kwargs={**inputs, "use_cache": False}, method="ppe", spans=[SPAN], outputs="reduced", **options)
    got = run(tokcompile.optimize(model, **given), **given["kwargs"]).output["last_hidden_state"][0]
    x = inputs["inputs_embeds"][0]
    rows, many = ppe.ppe(x[slice(*SPAN)].numpy(), 11, positions)
    text = [[i] * positions for i in range(40)]
    places = [*text[: SPAN[0]], *([SPAN[0] + i for i in group] for group in many), *text[SPAN[1] :]]
    share = [i * positions // band for band in (2, 3, 3) for i in range(band)] * 2
    tables = []
    for table in model.rotary_emb(inputs["inputs_embeds"], inputs["position_ids"]):  # (1, 40, 16), the axes in their sections
        tables.append(torch.tensor([[[table[0, p[g], c] for c, g in enumerate(share)] for p in places]]))
    x = torch.cat([x[: SPAN[0]], torch.from_numpy(rows).float(), x[SPAN[1] :]])[None]
    order = torch.tensor([p[0] for p in places])
    for layer in model.layers:
        mask = (order[:, None] >= order)[None, None]
        x = run(layer, x, attention_mask=mask, position_embeddings=tuple(tables))
        x = x[0] if isinstance(x, tuple) else x
    assert error(got, run(model.norm, x)[0]) < 1e-5
