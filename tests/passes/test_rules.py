"""Every rule: an op on reduced tokens gives what it gives on the kept tokens alone, sample by sample.

A case is a function that works for any number of tokens: (x: (B, L, D), extras) -> batch-first output. It is compiled for
all tokens, reduced at its input, and compared with the function itself on the kept rows of x and of the extras.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokcompile
from tests.passes.graphs import reduced, run, subset
from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.tokens import describe

D, KEPT = 16, 6
S, BODY = "Seq(1 + s0)", "Seq(s0)"


def extra(shape: str, batch: int, length: int, seed: int) -> Tensor:
    """Random values for a shape in words: "B L 16", "L L", "16"."""
    sizes = [{"B": batch, "L": length}.get(s) or int(s) for s in shape.split()]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restrict(value: Tensor, shape: str, sample: int, index: Tensor) -> Tensor:
    """One sample's share of an extra, its token axes indexed."""
    for axis, name in enumerate(shape.split()):
        value = value.narrow(axis, sample, 1) if name == "B" else value.index_select(axis, index) if name == "L" else value
    return value


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attend(x, bias=None, **options):
    q = x.unflatten(2, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q * 0.5, q + 1, attn_mask=bias, **options).transpose(1, 2).flatten(2)


def attend_by_hand(x, bias):
    q = x.reshape(x.shape[0], x.shape[1], 2, 8).permute(0, 2, 1, 3)
    return ((q @ q.mT * 0.3 + bias).softmax(-1) @ q).permute(0, 2, 1, 3).reshape(x.shape)


def grouped(x):
    q = x.unflatten(2, (4, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], enable_gqa=True).transpose(1, 2).flatten(2)


def folded(x):
    """Heads folded into the batch, as torch's own multi-head attention does."""
    b, n, _ = x.shape
    q = x.transpose(0, 1).reshape(n, b * 2, 8).transpose(0, 1)
    y = torch.bmm(torch.softmax(torch.bmm(q, q.transpose(1, 2)), -1), q)
    return y.transpose(0, 1).reshape(n, b, 16).transpose(0, 1)


def written(x, axis):
    """A number at some places of an axis."""
    x = x + 0
    x[(slice(None),) * axis + (torch.tensor([1, 3]),)] = 2.0
    return x


def turned(x, table):
    """A table for all heads, where these are folded into the batch."""
    b = len(x)
    return (x.unflatten(2, (2, 8)).transpose(1, 2).flatten(0, 1) * table).unflatten(0, (b, 2)).transpose(1, 2).flatten(2)


def experts(x, table):
    """Two of four experts a token, by the signs of two channels; rows are sorted by expert and put back."""
    rows = x.flatten(0, 1)
    ids, order = ((rows[:, :2] > 0).long() + torch.tensor([0, 2])).flatten().sort()
    y = F.silu(rows[order // 2]) * table[ids]
    back = torch.empty_like(order).index_put_([order], torch.arange(len(order)))
    return y[back].view(-1, 2, 16).sum(1).view_as(x)


def experts_that(do):
    """The same with something else in between, and one expert a token."""

    def fn(x):
        rows = x.flatten(0, 1)
        ids, order = (rows[:, 0] > 0).long().sort()
        return do(rows[order] * ids[:, None], ids, order)[order.argsort()].view_as(x)

    return fn


CASES = {
    # pointwise and rows
    "gelu": (lambda x: F.gelu(x), "", f"B, {S}, 16"),
    "clamp": (lambda x: x.clamp(-1, 1), "", f"B, {S}, 16"),
    "cast": (lambda x: x.float(), "", f"B, {S}, 16"),
    "scalar": (lambda x: (x * 2 + 1) / 3, "", f"B, {S}, 16"),
    "add-table": (lambda x, t: x + t, "L 16", f"B, {S}, 16"),
    "add-table-of-rank-3": (lambda x, t: t - x, "1 L 16", f"B, {S}, 16"),
    "add-column": (lambda x, t: x * t, "L 1", f"B, {S}, 16"),
    "add-row": (lambda x, t: x * t, "16", f"B, {S}, 16"),
    "add-per-sample": (lambda x, t: x + t, "B 1 16", f"B, {S}, 16"),
    "add-per-token": (lambda x, t: x + t, "B L 1", f"B, {S}, 16"),
    "where": (lambda x, t: torch.where(t > 0, x, x.new_zeros(())), "L 1", f"B, {S}, 16"),
    "masked-fill": (lambda x, t: x.masked_fill(t > 0, 0), "B L 1", f"B, {S}, 16"),
    "addcmul": (lambda x, t, u: torch.addcmul(t, x, u, value=2.0), "L 16, 16", f"B, {S}, 16"),
    "lerp": (lambda x, t: torch.lerp(x, t, 0.3), "L 16", f"B, {S}, 16"),
    "rope": (rotate, "L 16, L 16", f"B, {S}, 16"),
    "rope-heads-in-the-batch": (turned, "L 8", f"B, {S}, 16"),
    "pairs": (lambda x: x.unsqueeze(2) - x.unsqueeze(1), "", f"B, {S}, {S}, 16"),
    "layer-norm": (lambda x, w: F.layer_norm(x, (16,), w), "16", f"B, {S}, 16"),
    "rms-norm": (lambda x, w: F.rms_norm(x, (16,), w), "16", f"B, {S}, 16"),
    "batch-norm": (lambda x, m: F.batch_norm(x.mT, m, m.exp()).mT, "16", f"B, {S}, 16"),
    "linear": (lambda x, w, b: F.linear(x, w, b), "5 16, 5", f"B, {S}, 5"),
    "log-sigmoid": (lambda x: F.logsigmoid(x), "", f"B, {S}, 16"),
    "glu": (lambda x: F.glu(x), "", f"B, {S}, 8"),
    "softmax-of-channels": (lambda x: x.softmax(-1), "", f"B, {S}, 16"),
    "zeros-like": (lambda x: x + torch.zeros_like(x), "", f"B, {S}, 16"),
    # views
    "heads": (lambda x: x.view(*x.shape[:2], 2, 8).transpose(1, 2), "", f"B, 2, {S}, 8"),
    "heads-and-back": (
        lambda x: x.view(*x.shape[:2], 2, 8).transpose(1, 2).transpose(1, 2).reshape(x.shape),
        "",
        f"B, {S}, 16",
    ),
    "qkv": (lambda x, w: (x @ w).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)[1], "16 48", f"B, 2, {S}, 8"),
    "rows": (lambda x: (x.flatten(0, 1) * 2).view(x.shape), "", f"B, {S}, 16"),
    "flat-tokens": (lambda x: x.flatten(1), "", f"B, {S}*16"),
    "channels-first": (lambda x: x.permute(0, 2, 1), "", f"B, 16, {S}"),
    "movedim": (lambda x: x.movedim(1, -1), "", f"B, 16, {S}"),
    "mT": (lambda x: x.mT, "", f"B, 16, {S}"),
    "unsqueeze-squeeze": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1), "", f"B, {S}, 16, 1"),
    "squeeze-nothing": (lambda x: x.squeeze(1), "", f"B, {S}, 16"),
    "unflatten": (lambda x: x.unflatten(-1, (4, 4)), "", f"B, {S}, 4, 4"),
    "reshape-as": (lambda x: x.flatten(1).reshape_as(x), "", f"B, {S}, 16"),
    "expand": (lambda x: x[:, None].expand(-1, 4, -1, -1), "", f"B, 4, {S}, 16"),
    "expand-channels": (lambda x: x[..., :1].expand(-1, -1, 5), "", f"B, {S}, 5"),
    "repeat-channels": (lambda x: x.repeat(1, 1, 2), "", f"B, {S}, 32"),
    "repeat-interleave": (lambda x: x.repeat_interleave(2, 2), "", f"B, {S}, 32"),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * 1j).flatten(2),
        "",
        f"B, {S}, 16",
    ),
    "roll-channels": (lambda x: x.roll(3, -1), "", f"B, {S}, 16"),
    "flip-channels": (lambda x: x.flip(-1), "", f"B, {S}, 16"),
    "pad-channels": (lambda x: F.pad(x, (1, 2)), "", f"B, {S}, 19"),
    "pad-tokens": (lambda x: F.pad(x, (0, 1, 2, 3), value=1.0), "", "B, Seq(3 + s0 + 3), 17"),
    "write-channels": (lambda x: written(x, 2), "", f"B, {S}, 16"),
    # joining and cutting
    "cat-class-token": (lambda x, c: torch.cat([c.expand(x.shape[0], -1, -1), x], 1), "1 1 16", "B, Seq(2 + s0), 16"),
    "cat-suffix": (lambda x, c: torch.cat([x, c], 1), "B 2 16", "B, Seq(1 + s0 + 2), 16"),
    "cat-channels": (lambda x, t: torch.cat([x, t.expand(x.shape[0], -1, -1)], -1), "L 4", f"B, {S}, 20"),
    "cat-with-itself": (lambda x: torch.cat([x, x[:, 1:]], 1), "", "B, Seq(1 + s0 + s0), 16"),
    "stack": (lambda x, t: torch.stack([x, x + t], 1), "L 16", f"B, 2, {S}, 16"),
    "stack-table": (lambda x, t: torch.stack([x, t.expand_as(x)], -1), "L 16", f"B, {S}, 16, 2"),
    "body": (lambda x: x[:, 1:], "", f"B, {BODY}, 16"),
    "body-and-back": (lambda x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1), "", f"B, {S}, 16"),
    "class-token": (lambda x: x[:, 0], "", ""),
    "class-token-kept": (lambda x: x[:, :1], "", ""),
    "narrow": (lambda x: x.narrow(1, 1, x.shape[1] - 1), "", f"B, {BODY}, 16"),
    "split": (lambda x: x.split([1, x.shape[1] - 1], 1)[1], "", f"B, {BODY}, 16"),
    "every-other-channel": (lambda x: x[..., ::2], "", f"B, {S}, 8"),
    "chunk": (lambda x: x.chunk(3, -1)[2], "", f"B, {S}, 4"),
    "unbind": (lambda x: x.unbind(-1)[3], "", f"B, {S}"),
    "select": (lambda x: x.select(-1, 3), "", f"B, {S}"),
    "slice-scatter": (lambda x, t: torch.slice_scatter(x, x[..., :4] * t, 2, 2, 6), "L 4", f"B, {S}, 16"),
    "every-other-channel-written": (lambda x, t: torch.slice_scatter(x, x[..., :8] * t, 2, 0, 16, 2), "L 8", f"B, {S}, 16"),
    "write-body": (lambda x, t: torch.slice_scatter(x, x[:, 1:] + t[1:], 1, 1), "L 16", f"B, {S}, 16"),
    "write-class-token": (lambda x, c: torch.slice_scatter(x, c, 1, 0, 1), "B 1 16", f"B, {S}, 16"),
    "write-one-token": (lambda x, c: torch.select_scatter(x, c, 1, 0), "B 16", f"B, {S}, 16"),
    "write-one-channel": (lambda x, t: torch.select_scatter(x, (x[..., 1] * t), 2, 3), "L", f"B, {S}, 16"),
    "write-into-zeros": (
        lambda x: torch.slice_scatter(x.new_zeros(len(x), x.shape[1] + 2, 16), x, 1, 2),
        "",
        "B, Seq(3 + s0), 16",
    ),
    # indexing
    "embedding": (lambda x, t: F.embedding(x.argmax(-1), t), "16 5", f"B, {S}, 5"),
    "one-hot": (lambda x: F.one_hot(x.argmax(-1), 16) * x, "", f"B, {S}, 16"),
    "index-select": (lambda x: x.index_select(-1, torch.tensor([3, 1, 3])), "", f"B, {S}, 3"),
    "index": (lambda x: x[..., torch.tensor([3, 1])], "", f"B, {S}, 2"),
    "index-of-the-class-token": (lambda x: x[:, torch.tensor([0])] * 2, "", ""),
    "look-up": (lambda x, t: t[x.argmax(-1)], "16 5", f"B, {S}, 5"),
    "gather": (lambda x, t: x.gather(2, t.argsort(-1)[:, :, :4]), "B L 16", f"B, {S}, 4"),
    "bits": (lambda x: ((x > 0) & (x < 1) | (x > 2)) ^ (x < -1), "", f"B, {S}, 16"),
    "experts": (experts, "4 16", f"B, {S}, 16"),
    "experts-normed": (experts_that(lambda y, *_: F.rms_norm(y, (16,)) + y.mean(-1, keepdim=True)), "", f"B, {S}, 16"),
    "experts-of-channels": (experts_that(lambda y, *_: y * y.unsqueeze(1).chunk(2, -1)[1][..., 3:4][:, 0]), "", f"B, {S}, 16"),
    "scatter-value": (lambda x: torch.zeros_like(x).scatter(-1, x.topk(3).indices, 1.0) * x, "", f"B, {S}, 16"),
    "scatter-table": (lambda x, t: t.expand_as(x).scatter(-1, x.topk(3).indices, x), "L 16", f"B, {S}, 16"),
    # over other axes than the tokens
    "mean-of-channels": (lambda x: x.mean(-1), "", f"B, {S}"),
    "sum-kept": (lambda x: x.sum(-1, keepdim=True), "", f"B, {S}, 1"),
    "amax": (lambda x: x.amax(-1), "", f"B, {S}"),
    "var": (lambda x: x.var(-1), "", f"B, {S}"),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), "", f"B, {S}, 16"),
    "max": (lambda x: x.max(-1).values, "", f"B, {S}"),
    "topk": (lambda x: x.topk(3).values, "", f"B, {S}, 3"),
    "sort": (lambda x: x.sort(-1).values, "", f"B, {S}, 16"),
    "argmax": (lambda x: x.argmax(-1), "", f"B, {S}"),
    "cumsum": (lambda x: x.cumsum(-1), "", f"B, {S}, 16"),
    # over the tokens
    "mean-of-tokens": (lambda x: x[:, 1:].mean(1), "", ""),
    "max-of-tokens": (lambda x: x.amax(1), "", ""),
    "softmax-of-tokens": (lambda x: x.softmax(1), "", f"B, {S}, 16"),
    "pooled-table": (lambda x, t: x.mT.softmax(-1) @ t, "L 5", ""),
    "pooled-table-a-row-each": (lambda x, t: x[..., 0].softmax(1) @ t, "L 5", ""),
    "pooled-table-by-einsum": (lambda x, t: torch.einsum("bnk,nc->bkc", x.softmax(1), t), "L 5", ""),
    "shared-out-table": (lambda x, t: (x.exp() / x.exp().sum(1, True)).mT @ t, "L 5", ""),
    # products
    "matmul": (lambda x, w: x @ w, "16 5", f"B, {S}, 5"),
    "scores": (lambda x: x @ x.mT, "", f"B, {S}, {S}"),
    "einsum": (lambda x: torch.einsum("bnd,bmd->bnm", x, x), "", f"B, {S}, {S}"),
    "einsum-table": (lambda x, t: torch.einsum("bnd,nmd->bnm", x, t), "L 5 16", f"B, {S}, 5"),
    "einsum-implicit": (lambda x, w: torch.einsum("bnd,de", x, w), "16 5", f"B, 5, {S}"),
    "einsum-ellipsis": (lambda x, w: torch.einsum("...d, de -> ...e", x, w), "16 5", f"B, {S}, 5"),
    "einsum-of-heads": (
        lambda x, t: torch.einsum("...nd,nd->...n", x.unflatten(-1, (2, 8)).transpose(1, 2), t),
        "L 8",
        f"B, 2, {S}",
    ),
    "conv-of-width-1": (lambda x, w: F.conv1d(x.mT, w), "5 16 1", f"B, 5, {S}"),
    "baddbmm": (lambda x, t: torch.baddbmm(t.expand(x.shape[0], -1, -1), x, x.mT, beta=0.5), "L L", f"B, {S}, {S}"),
    # attention
    "sdpa": (attend, "", f"B, {S}, 16"),
    "sdpa-scale": (lambda x: attend(x, scale=0.7), "", f"B, {S}, 16"),
    "sdpa-bias": (attend, "2 L L", f"B, {S}, 16"),
    "sdpa-bias-per-sample": (attend, "B 1 L L", f"B, {S}, 16"),
    "sdpa-row-mask": (lambda x, t: attend(x, t > -1.5), "B 1 1 L", f"B, {S}, 16"),
    "sdpa-boolean-mask": (lambda x, t: attend(x, (t > 0) | (t == t.mT)), "L L", f"B, {S}, 16"),
    "sdpa-grouped-queries": (grouped, "", f"B, {S}, 16"),
    "by-hand-with-bias": (attend_by_hand, "2 L L", f"B, {S}, 16"),
    "heads-in-the-batch": (folded, "", f"B, {S}, 16"),
}
LAYOUTS = {
    "batch3-sorted": dict(batch=3, length=11, sort=True),
    "batch1-as-long-as-wide": dict(batch=1, length=16, sort=False),
    "batch3-as-long-as-wide": dict(batch=3, length=16, sort=False),
}


def shorthand(label, batch: int) -> str:
    """The label as a case writes it: batches as B, spaces by name."""
    if label is None:
        return ""
    sizes = {f"B{batch}": "B", str(batch): "B"}
    words = [describe((axis,)).strip("[]") for axis in label]
    words = [sizes.get(word, word) if i == 0 else word for i, word in enumerate(words)]
    return ", ".join(words).replace("s0:10->6", "s0").replace("s0:15->6", "s0")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_what_the_kept_tokens_give(name, layout):
    fn, shapes, want_label = CASES[name]
    batch, length, sort = LAYOUTS[layout].values()
    shapes = [s.strip() for s in shapes.split(",") if s]
    x = extra("B L 16", batch, length, 1)
    extras = [extra(s, batch, length, 2 + i) for i, s in enumerate(shapes)]
    index = subset(batch, length - 1, KEPT, sort)
    out = reduced(fn, (x, *extras), index, length - 1, prefix=1)
    assert out.recoveries == []
    if want_label.count("s0"):
        assert shorthand(out.output_labels[0], batch) == want_label
    got = run(out.gm, x, *extras)[0]
    for b in range(batch):
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), index[b] + 1])
        want = fn(restrict(x, "B L 16", b, rows), *(restrict(v, s, b, rows) for v, s in zip(extras, shapes)))
        torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_causal_attention_goes_by_original_positions(batch, order):
    x = extra("B L 16", batch, 11, 1)
    index = subset(batch, 11, KEPT, order == "sorted")
    out = reduced(lambda x: attend(x, is_causal=True), (x,), index, 11)
    fused = next(n for n in out.gm.graph.nodes if "scaled_dot" in str(n.target))
    assert bool(fused.kwargs.get("is_causal") or fused.args[5:6] == (True,)) == (order == "sorted")
    got = run(out.gm, x)[0]
    for b in range(batch):
        mask = index[b][:, None] >= index[b][None]
        torch.testing.assert_close(got[b : b + 1], attend(x[b : b + 1, index[b]], mask), rtol=0, atol=1e-12)


def halves(x):
    """Two views of each image, one half of the batch each, that look at each other."""
    return torch.cat([a + (a @ b.mT).softmax(-1) @ b for a, b in (x.chunk(2), x.chunk(2)[::-1])])


@pytest.mark.parametrize("batch", [2, 4])
def test_halves_of_a_batch_look_at_each_other(batch):
    x, index = extra("B L 16", batch, 11, 1), subset(batch, 11, KEPT)
    out = reduced(halves, (x,), index, 11)
    assert (out.recoveries, shorthand(out.output_labels[0], batch)) == ([], "B, Seq(s0:11->6), 16")
    kept = torch.stack([x[b, index[b]] for b in range(batch)])
    torch.testing.assert_close(run(out.gm, x)[0], halves(kept), rtol=0, atol=1e-12)


class Largest(torch.nn.Module):
    """Two layers in which every token attends to the four keys that it scores highest."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT * 0.3
            scores = scores.masked_fill(scores < scores.topk(4).values[..., -1:], -1e9)
            x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


def test_attention_to_the_largest_scores_is_to_those_of_the_tokens_left():
    torch.manual_seed(0)
    model, x = Largest().eval(), extra("B L 16", 2, 16, 1).float()
    optimized = tokcompile.optimize(model, (x,), method="random", budget=0.5, where=[0], outputs="reduced")
    assert not optimized.report.recoveries
    assert tokcompile.check(model, (x,)).ok
    with pytest.raises(UnsupportedGraph, match="it gives positions of tokens"):  # fewer than it attends to
        tokcompile.optimize(model, (x,), method="random", budget=tokcompile.Tokens(3), where=[0])
    with pytest.raises(UnsupportedGraph, match="of which one now stands for several"):
        tokcompile.optimize(model, (x,), method="tome", where=[0])
