"""What is a block, however attention, MLP, norms and masks are wired, and what is none."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BOTH_MASKS
from tests.passes.graphs import Function, canonical
from tests.passes.parts import D, Parts, pre_norm
from tokcompile.passes.find import find
from tokcompile.passes.graph import packet, shape

X = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(0))


def post_norm(m, x):
    x = m.norm1(x + m.attend(x))
    return m.norm2(x + m.mlp(x))


def post_norm_of_the_branch(m, x):
    x = x + m.norm1(m.attend(x))
    return x + m.norm2(m.mlp(x))


def layer_scale(m, x):
    x = x + m.attend(m.norm1(x)) * m.scale
    return m.mlp(m.norm2(x)) * m.scale + x


def written_out(m, x):
    x = x + m.by_hand(m.norm1(x))
    return x + m.mlp(m.norm2(x))


def with_a_bias(m, x):
    x = x + m.by_hand(m.norm1(x), lambda s: s + torch.ones(2, 12, 12))
    return x + m.mlp(m.norm2(x))


def without_the_diagonal(m, x):
    x = x + m.by_hand(m.norm1(x), lambda s: s.masked_fill(torch.eye(12, dtype=torch.bool), -1e9))
    return x + m.mlp(m.norm2(x))


def talking_heads(m, x):
    x = x + m.by_hand(m.norm1(x), m.mix, m.mix)
    return x + m.mlp(m.norm2(x))


def normed_heads(m, x):
    norm = lambda weights: F.layer_norm(m.mix(weights).permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2)  # noqa: E731
    x = x + m.by_hand(m.norm1(x), weigh=norm)
    return x + m.mlp(m.norm2(x))


def maps_apart(m, x):
    """As published code of differential attention takes the two maps of a head apart."""
    x = x + m.by_hand(m.norm1(x), weigh=lambda a: a.view(2, 1, 2, 12, 12)[:, :, 0] - 0.5 * a.view(2, 1, 2, 12, 12)[:, :, 1])
    return x + m.mlp(m.norm2(x))


def steps(m, x):
    x = F.normalize(torch.lerp(x, m.attend(x), m.scale * 0.3), dim=-1)
    return F.normalize(torch.lerp(x, m.mlp(x), m.scale * 0.3), dim=-1)


def causal_by_hand(m, x):
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    x = x + m.by_hand(m.norm1(x), lambda s: s.masked_fill(future, -1e9))
    return x + m.mlp(x)


def causal_by_choice(m, x):
    x = x + m.by_hand(m.norm1(x), lambda s: torch.where(torch.ones(12, 12, dtype=torch.bool).tril(), s, -1e9))
    return x + m.mlp(x)


def causal_and_padded(m, x):
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & (x[:, None, None, :, 0] < 9)
    x = x + m.attend(m.norm1(x), attn_mask=seen.expand(2, -1, 12, 12))
    return x + m.mlp(x)


def causal_with_a_bias(m, x):
    hidden = torch.zeros(12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    x = x + m.attend(m.norm1(x), attn_mask=hidden + x[:, None, None, :, 0])
    return x + m.mlp(x)


def causal_with_a_mask_over_it(m, x):
    x = x + m.attend(m.norm1(x), is_causal=True, attn_mask=x[:, None, None, :, 0])
    return x + m.mlp(x)


def causal_unless_padded(m, x):
    hidden = ~torch.ones(12, 12, dtype=torch.bool).tril() | (x[:, None, None, :, 0] > 9)
    x = x + m.attend(m.norm1(x), attn_mask=torch.where(hidden, -1e9, 0.0))
    return x + m.mlp(x)


def parallel(m, x):
    y = m.norm1(x)
    return x + m.attend(y) + m.mlp(y)


def parallel_in_one_add(m, x):
    y = m.norm1(x)
    return x + (m.attend(y) + m.mlp(y))


def attention_only(m, x):
    return x + m.attend(m.norm1(x))


def scaled_stream(m, x):
    x = x * m.scale + m.attend(m.norm1(x))
    return x * m.scale + m.mlp(m.norm2(x))


def causal(m, x):
    x = x + m.attend(m.norm1(x), is_causal=True)
    return x + m.mlp(x)


def without_residual(m, x):
    return m.mlp(m.attend(m.norm1(x)))


def cross(m, x):
    return m.mlp(m.attend(m.scale.expand(2, 1, D), x))


@pytest.mark.parametrize(("wiring", "mid_op", "end_op"), [
    (pre_norm, "aten.add", "aten.add"),
    (post_norm, "aten.add", None),
    (post_norm_of_the_branch, "aten.add", "aten.add"),
    (layer_scale, "aten.add", "aten.add"),
    (written_out, "aten.add", "aten.add"),
    (with_a_bias, "aten.add", "aten.add"),
    (parallel, "aten.add", "aten.add"),
    (parallel_in_one_add, "aten.add", None),
    (attention_only, "aten.add", None),
    (scaled_stream, "aten.add", "aten.add"),
    (without_the_diagonal, "aten.add", "aten.add"),
    (talking_heads, "aten.add", "aten.add"),
    (normed_heads, "aten.add", "aten.add"),
    (maps_apart, "aten.add", "aten.add"),
    (steps, "aten.lerp", None),
    (causal, "aten.add", "aten.add"),
    (causal_by_hand, "aten.add", "aten.add"),
    (causal_by_choice, "aten.add", "aten.add"),
    (causal_and_padded, "aten.add", "aten.add"),
    (causal_with_a_bias, "aten.add", "aten.add"),
    pytest.param(causal_with_a_mask_over_it, "aten.add", "aten.add", marks=BOTH_MASKS),
    (causal_unless_padded, "aten.add", "aten.add"),
], ids=lambda v: getattr(v, "__name__", v) or "none")  # fmt: skip
def test_blocks_however_they_are_wired(wiring, mid_op, end_op):
    gm = canonical(Parts(wiring), X)
    (block,) = find(gm).blocks
    assert block.entry.op == "placeholder"
    assert packet(block.mid) == mid_op
    assert (packet(block.end) if block.end else None) == end_op
    assert block.parallel == (wiring is parallel)
    assert block.out is (block.end if wiring is parallel else block.mid)
    (attention,) = block.attentions
    assert attention.causal == wiring.__name__.startswith("causal")
    assert attention.fused == ("by_hand" not in wiring.__code__.co_names)
    assert shape(attention.k)[-2:] in ((12, 8), (8, 12))
    assert (block.stage.length, block.token_axis, block.batch_axis) == (12, 1, 0)


def test_maps_that_are_added_to_earlier_maps_are_no_stream():
    def wiring(m, x):
        maps = []
        for _ in range(2):
            x = x + m.by_hand(m.norm1(x), weigh=lambda a: maps.append(0.7 * a + 0.3 * maps[-1] if maps else a) or maps[-1])
        return x

    blocks = find(canonical(Parts(wiring), X)).blocks
    assert [(shape(b.mid), b.why_not) for b in blocks] == [(tuple(X.shape), None)] * 2


@pytest.mark.parametrize("wiring", [without_residual, cross], ids=lambda f: f.__name__)
def test_attention_without_a_residual_is_no_block(wiring):
    found = find(canonical(Parts(wiring), X))
    assert found.blocks == []
    assert len(found.unrecognised) == 1


def test_a_softmax_that_is_no_attention_is_ignored():
    found = find(canonical(Function(lambda x: x + x.softmax(-1)), X))
    assert (found.blocks, found.unrecognised, found.leading) == ([], [], set())
