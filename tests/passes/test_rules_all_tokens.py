"""Ops that need all tokens have them given back, or are refused."""

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import canonical, fixed, reduced, rewriter, run, subset
from tests.passes.test_rules import KEPT, experts_that, extra, written
from tokcompile.errors import UnsupportedGraph


def test_samples_in_another_order_have_their_tokens_back():
    x = extra("B L 16", 4, 11, 1)
    out = reduced(lambda x: torch.cat(x.chunk(2)[::-1]), (x,), subset(4, 11, KEPT), 11)
    assert [r.reason for r in out.recoveries] == ["it puts samples together"]


def test_samples_that_are_channels_have_their_tokens_back():
    x, weight = extra("B L 16", 2, 11, 1), torch.ones(4, 16, 1, dtype=torch.float64)  # of its own for each sample
    out = reduced(lambda x, w: F.conv1d(x.mT.reshape(1, 32, 11), w, groups=2), (x, weight), subset(2, 11, KEPT), 11)
    assert [r.reason for r in out.recoveries] == ["it mixes samples that keep other tokens"]


NEED_ALL = {
    "smallest": (lambda x: x.mT.topk(3, largest=False).values, "it gives positions of tokens"),
    "median": (lambda x: x.mT.kthvalue(3).values, "it gives positions of tokens"),
    "largest-behind-the-blocks": (lambda x: x.mT.topk(3).values, "it gives positions of tokens"),
    "largest": (lambda x: x.mT.topk(3).indices, "it gives positions of tokens"),
    "cumsum": (lambda x: x.cumsum(1), "it gives positions of tokens"),
    "sort": (lambda x: x.sort(1).values, "it gives positions of tokens"),
    "argmax": (lambda x: x.argmax(1), "it gives positions of tokens"),
    "max-with-indices": (lambda x: x.max(1), "it gives positions of tokens"),
    "flip": (lambda x: x.flip(1), "it moves values along the token axis"),
    "roll": (lambda x: x.roll(2, 1), "it moves values along the token axis"),
    "roll-flat": (lambda x: x.roll(2), "it moves values along the token axis"),
    "shift": (lambda x: F.pad(x, (0, 0, 1, -1)), "it moves values along the token axis"),
    "pad-by-mirror": (lambda x: F.pad(x.mT, (2, 2), "reflect"), "it moves values along the token axis"),
    "write": (lambda x: written(x, 1), "it writes at positions of a tensor"),
    "every-other-token": (lambda x: x[:, ::2], "it takes every other token"),
    "one-token": (lambda x: x[:, 4], "it picks one of the reduced tokens|it cuts through"),
    "first-half": (lambda x: x[:, :6], "it cuts through the reduced tokens"),
    "unbind": (lambda x: x.unbind(1)[0], "it handles each token by itself"),
    "grid": (lambda x: x.view(x.shape[0], 3, 4, 16).mean(2), "it views the tokens as a grid"),
    "index-select": (lambda x: x.index_select(1, torch.tensor([5, 3])), "it picks few tokens"),
    "index": (lambda x: x[:, torch.tensor([5, 3])], "it picks few tokens"),
    "most": (lambda x: x[:, torch.tensor([5, 3, 1, 2, 0, 9])], "it picks some tokens by position"),
    "gather": (lambda x: x.gather(1, torch.zeros(x.shape[0], 1, 16, dtype=torch.int64)), "it picks tokens by position"),
    "var": (lambda x: x.var(1), "its statistics run over all tokens"),
    "layer-norm": (lambda x: F.layer_norm(x, (12, 16)), "it normalises over tokens"),
    "group-norm": (lambda x: F.group_norm(x.mT, 4), "its statistics run over all tokens"),
    "glu": (lambda x: F.glu(x, 1), "it pairs tokens with each other"),
    "token-mlp": (
        lambda x: F.linear(x.mT, torch.ones(5, 12, dtype=x.dtype)),
        "it mixes tokens by a weight per position",
    ),
    "pooled-by-a-product": (lambda x: torch.ones(4, 12, dtype=x.dtype) @ x, "it adds tokens up by a weight per position"),
    "pooled-by-an-einsum": (
        lambda x: torch.einsum("kn,bnd->bkd", torch.ones(4, 12, dtype=x.dtype), x),
        "it adds tokens up by a weight per position",
    ),
    "summed-by-an-einsum": (lambda x: torch.einsum("bnd->bd", x), "it adds tokens up by a weight per position"),
    "conv": (lambda x: F.conv1d(x.mT, torch.ones(5, 16, 3, dtype=x.dtype)), "it convolves over the token grid"),
    "pool": (lambda x: F.avg_pool1d(x.mT, 2), "it works on the token grid"),
    "scatter": (
        lambda x: x.scatter(1, torch.zeros(x.shape[0], 1, 16, dtype=torch.int64), 0.0),
        "it writes at positions",
    ),
    "unknown-op": (lambda x: torch.cdist(x, x), "there is no rule for it"),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NEED_ALL)
def test_an_op_that_needs_all_tokens_gets_them_or_is_refused(name, batch):
    """With recovery and nothing dropped it gives exactly what the original gives, in the original order."""
    fn, reason = NEED_ALL[name]
    x = extra("B L 16", batch, 12, 1)
    graph = canonical(fn, x)
    shuffled = subset(batch, 11, 11, sort=False)
    with pytest.raises(UnsupportedGraph, match=f"cannot be rewritten: .*({reason})"):
        rewriter(graph, fixed(shuffled), 11, 11, prefix=1, recover="never").run()
    out = rewriter(graph, fixed(shuffled), 11, 11, prefix=1).run()
    assert len(out.recoveries) == 1
    assert not out.recoveries[0].inside
    for got, want in zip(run(out.gm, x), run(graph, x)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("do", [
    lambda y, *_: y.cumsum(0),
    lambda y, *_: y.flip(0),
    lambda y, *_: y - y.mean(0),
    lambda y, *_: y.chunk(2)[0].repeat(2, 1),
    lambda y, *_: y * torch.arange(len(y))[:, None],
    lambda y, *_: (y[:, None] - y).mean(1),
    lambda y, ids, _: y[ids],
    lambda y, ids, _: y * torch.histc(ids.double(), 2, 0, 1)[ids][:, None],
    lambda y, _, order: y * (order % 2)[:, None],
    lambda y, _, order: y * torch.arange(50)[order][:, None],
])  # fmt: skip
def test_experts_that_look_at_other_rows_are_not_written_over_fewer(do):
    x = extra("B L 16", 1, 12, 1)
    with pytest.raises(UnsupportedGraph, match="it gives positions of tokens"):
        reduced(experts_that(do), (x,), subset(1, 12, KEPT), 12, recover="never")


def test_dropped_tokens_are_given_the_row_of_the_nearest_kept_one():
    """Pruned tokens have no slot of their own: cosine similarity decides, and kept ones get exactly their own row."""
    x = extra("B L 16", 2, 11, 1)
    index = subset(2, 11, KEPT)
    got = run(reduced(lambda x: x.flip(1), (x,), index, 11).gm, x)[0].flip(1)
    for b in range(2):
        assert torch.equal(got[b, index[b]], x[b, index[b]])
        unit = F.normalize(x[b], dim=-1)
        nearest = (unit @ unit[index[b]].T).argmax(-1)
        assert torch.equal(got[b], x[b, index[b]][nearest])
