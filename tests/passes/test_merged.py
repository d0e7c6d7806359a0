"""Rules on merged tokens: attention, means, sums and products, in which each weighs what it holds; and what is given back."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.passes.graphs import canonical, merging, reduced, rewriter, run, subset
from tests.passes.test_rules import attend, attend_by_hand, extra, folded

SIZES = torch.tensor([[1.0, 3.0, 2.0, 1.0], [2.0, 2.0, 2.0, 1.0]], dtype=torch.float64)
MERGE = dict(
    index=torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5]]),
    sources=torch.tensor([[1, 4, 5], [0, 3, 6]]),
    slots=torch.tensor([[1, 1, 2], [0, 1, 2]]),
)


def merged_rows(x):
    """The size-weighted means of MERGE, written out."""
    out = []
    for b in range(2):
        members = [[i] for i in MERGE["index"][b].tolist()]
        for source, slot in zip(MERGE["sources"][b].tolist(), MERGE["slots"][b].tolist()):
            members[slot].append(source)
        out.append(torch.stack([x[b, m].mean(0) for m in members]))
    return torch.stack(out)


def merge(fn, x, proportional=True, **options):
    gm = canonical(fn, x)
    return run(rewriter(gm, merging(**MERGE, proportional=proportional), 7, 4, **options).run().gm, x)[0]


def test_merging_is_the_mean_of_the_members():
    x = extra("B L 16", 2, 7, 1)
    torch.testing.assert_close(merge(lambda x: x * 2, x), merged_rows(x) * 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("form", ["sdpa", "by-hand", "heads-in-the-batch"])
def test_keys_weigh_as_many_tokens_as_they_hold(form, proportional):
    fn = {"sdpa": attend, "by-hand": lambda x: attend_by_hand(x, 0.0), "heads-in-the-batch": folded}[form]
    scale = {"sdpa": 8**-0.5 * 0.5, "by-hand": 0.3, "heads-in-the-batch": 1.0}[form]
    x = extra("B L 16", 2, 7, 1)
    rows = merged_rows(x)
    q = rows.unflatten(2, (2, 8)).transpose(1, 2)
    scores = q @ q.mT * scale + (SIZES.log()[:, None, None] if proportional else 0)
    value = q + 1 if form == "sdpa" else q
    want = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merge(fn, x, proportional), want, rtol=0, atol=1e-6)


def test_masked_attention_with_sizes_keeps_its_mask():
    x = extra("B L 16", 2, 7, 1)
    rows, index = merged_rows(x), MERGE["index"]
    q = rows.unflatten(2, (2, 8)).transpose(1, 2)
    hidden = torch.stack([(i[:, None] < i[None]) for i in index])[:, None]
    scores = (q @ q.mT * 8**-0.5 * 0.5 + SIZES.log()[:, None, None]).masked_fill(hidden, float("-inf"))
    want = (scores.softmax(-1) @ (q + 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merge(lambda x: attend(x, is_causal=True), x), want, rtol=0, atol=1e-6)
    boolean = lambda x: attend(x, torch.ones(7, 7, dtype=torch.bool).tril())  # noqa: E731
    torch.testing.assert_close(merge(boolean, x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("weighted", [True, False])
def test_means_and_sums_weigh_by_size(weighted, keepdim):
    x = extra("B L 16", 2, 7, 1)
    rows = merged_rows(x)
    weights = SIZES[:, :, None] if weighted else torch.ones(2, 4, 1, dtype=torch.float64)
    mean = (rows * weights).sum(1, keepdim) / weights.sum(1, keepdim)
    got = merge(lambda x: x.mean(1, keepdim), x, size_weighted_mean=weighted)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-6)
    total = merge(lambda x: x.sum(1, keepdim), x, size_weighted_mean=weighted)  # of all tokens, whatever a mean is of
    torch.testing.assert_close(total, (rows * SIZES[:, :, None]).sum(1, keepdim), rtol=0, atol=1e-6)
    both = merge(lambda x: x.mean((1, 2)), x, size_weighted_mean=weighted)
    torch.testing.assert_close(both, ((rows * weights).sum(1) / weights.sum(1)).mean(-1), rtol=0, atol=1e-6)
    first = merge(lambda x: x.mT.mean(2), x, size_weighted_mean=weighted)
    torch.testing.assert_close(first, (rows * weights).sum(1) / weights.sum(1), rtol=0, atol=1e-6)


POOLINGS = {
    "along-the-tokens": lambda x: (x[..., :1].softmax(1) * x).sum(1),
    "unsqueezed": lambda x: (x[..., 0].softmax(-1)[..., None] * x).sum(1),
    "turned": lambda x: (x[..., :1].mT.softmax(-1) * x.mT * 2).sum(-1) / 2,
    "viewed": lambda x: (x[..., 0].softmax(-1).view(2, 7, 1).expand_as(x) * x).sum(1),
}


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", POOLINGS)
def test_sums_that_a_softmax_weighs_count_sizes_once(name, proportional):
    x = extra("B L 16", 2, 7, 1)
    rows = merged_rows(x)
    weights = (rows[..., 0] + (SIZES.log() if proportional else 0)).softmax(-1)
    torch.testing.assert_close(merge(POOLINGS[name], x, proportional), (weights[..., None] * rows).sum(1), rtol=0, atol=1e-6)


def test_sums_across_a_softmax_weigh_by_size():
    x = extra("B L 16", 2, 7, 1)
    want = (SIZES[..., None] * merged_rows(x).softmax(-1)).sum(1)
    torch.testing.assert_close(merge(lambda x: x.softmax(-1).sum(1), x), want, rtol=0, atol=1e-6)


ALL = {
    "product": lambda x: x.mT @ x,
    "einsum": lambda x: torch.einsum("bnc,bnd->bcd", x, x),
    "norm": lambda x: x.norm(dim=1),
    "norm of another order": lambda x: torch.linalg.vector_norm(x, 3, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "how many": lambda x: (x > 0.5).sum(1),
    "sum without NaN": lambda x: torch.where(x > 0.5, x, torch.nan).nansum(1),
    "norm in old words": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 3, [1]),
    "product of each": lambda x: x.sigmoid().prod(1),
    "flattened": lambda x: x.mT.flatten(1).sum(1, True),
    "sum in another dtype": lambda x: x.float().sum(1, dtype=torch.float64),
    "mean in another dtype": lambda x: x.float().mean(1, dtype=torch.float64),
    "masked mean": lambda x: (x * MASK).sum(1) / MASK.sum(1),
    "linear attention": lambda x: (x.exp() @ (x.exp().mT @ x)) / (x.exp() @ x.exp().sum(1)[:, :, None]),
    "softmax by hand": lambda x: (x / x.sum(1, True)).mT @ x,
    "clusters": lambda x: x.softmax(-1).mT @ x,
    "clusters by einsum": lambda x: torch.einsum("bnk,bnd->bkd", x.softmax(-1), x),
    "slots": lambda x: (x.softmax(-1) / x.softmax(-1).sum(1, True)).mT @ x,
    "a gate": lambda x: torch.einsum("bn,bnd->bd", x[..., 0].sigmoid(), x) / x[..., 0].sigmoid().sum(1, True),
}
QUERIES = extra("L 16", 1, 7, 2)
MASK = torch.ones(2, 7, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_sums_over_merged_tokens_are_sums_over_all(name):
    """Each counts as often as it holds tokens: as if all of these were there, equal to it."""
    as_if_all_were_there(ALL[name])


def as_if_all_were_there(fn, **options):
    x = extra("B L 16", 2, 7, 1).abs()
    rows, counts = merged_rows(x), SIZES.long()
    got = merge(fn, x, **options)
    for b in range(2):
        every = rows[b].repeat_interleave(counts[b], 0)[None]
        want = fn(every.expand(2, -1, -1))[:1]
        if want.shape[1] == 7:  # a result for each token
            want = want[:, counts[b].cumsum(0) - counts[b]]
        torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=2e-6)


def columns(x):
    weights = (x @ x.mT).softmax(-1)
    return (weights / (1e-9 + weights.sum(-2, True))) @ x


@pytest.mark.parametrize("fn", [
    lambda x: x + x * x.softmax(1) * 7,
    lambda x: x.softmax(1).sqrt(),
    lambda x: x.log_softmax(1) * x,
    lambda x: ((x @ x.mT).softmax(-1) - 0.1).relu() @ x,
    lambda x: (x.softmax(1).square() * x).mean(1, True),
    columns,
    lambda x: (0.3 * (x @ x.mT).softmax(-1) + torch.eye(7, dtype=x.dtype)) @ x,
])  # fmt: skip
def test_in_front_of_a_block_weights_of_groups_become_those_of_members(fn):
    """Where what is done with weights of a softmax is not linear in them."""
    as_if_all_were_there(fn, leading=True)


def test_in_front_of_a_block_products_of_weights_are_not_summed():
    with pytest.raises(tokcompile.UnsupportedGraph, match="is not the same for shares of them"):
        as_if_all_were_there(lambda x: x.softmax(1) @ (x.softmax(1).mT @ x.softmax(1)), leading=True)


@pytest.mark.parametrize("fn", [
    lambda x, n: x * (x.sum(1, True) / n),
    lambda x, n: x * (x * (1 / n)).sum(1, True),
    lambda x, n: x * ((x > 0).sum(1, True) / n),
    lambda x, n: x @ (x.mT @ x).mul(2).div(n),
    lambda x, n: torch.einsum("bnc,bnd->bcd", x / n, x),
])  # fmt: skip
def test_in_front_of_a_block_sums_that_their_number_divides_are_means(fn):
    x, index = extra("B L 16", 2, 7, 1), subset(2, 6, 3, True)
    got = run(reduced(lambda x: fn(x, 7), (x,), index, 6, prefix=1, leading=True).gm, x)[0]
    for b in range(2):
        kept = x[b : b + 1, torch.cat([torch.zeros(1, dtype=torch.int64), index[b] + 1])]
        torch.testing.assert_close(got[b : b + 1], fn(kept, 4), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("fn", "reason"), [
    (lambda x: x * x.sum(1, True), "it adds up all tokens"),
    (lambda x: x * x.sum(1, True).square() / 7, "it adds up all tokens"),
    (lambda x: x + x * x.softmax(1) * 7, "it weighs tokens by a share times how many there were"),
])  # fmt: skip
def test_in_front_of_a_block_sums_that_miss_tokens_are_refused(fn, reason):
    x = extra("B L 16", 2, 7, 1)
    with pytest.raises(tokcompile.UnsupportedGraph, match=reason):
        reduced(fn, (x,), subset(2, 6, 3, True), 6, prefix=1, leading=True)


@pytest.mark.parametrize("name", ["product", "einsum", "norm", "logsumexp", "masked mean", "clusters", "clusters by einsum"])
def test_sums_that_miss_tokens_have_them_back(name):
    """Outside of the blocks, where nothing else is short of the same tokens: a kept one stands for those that are gone."""
    x = extra("B L 16", 2, 7, 1)
    index = subset(2, 6, 3, True)
    out = reduced(ALL[name], (x,), index, 6, prefix=1)
    reason = (
        "it adds tokens up by a weight per position" if name == "masked mean" else "it adds up all tokens, and some are gone"
    )
    assert [r.reason for r in out.recoveries] == [reason]
    whole = run(reduced(lambda x: x.flip(1), (x,), index, 6, prefix=1).gm, x)[0].flip(1)
    torch.testing.assert_close(run(out.gm, x)[0], ALL[name](whole), rtol=0, atol=1e-9)


class Counting(nn.Module):
    """A tower behind which a sum counts its tokens."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.tower = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x):
        x = self.tower(x)
        return torch.cat([x, (x[..., :1] > -1e9).to(x.dtype)], -1).sum(1)


@pytest.mark.every(2)
@pytest.mark.parametrize("methods", [("tome", "tome"), ("tome", "random"), ("random", "tome"), ("tome", "evit")])
def test_sums_behind_two_methods_are_sums_over_all(methods):
    first = tokcompile.optimize(Counting().eval(), (torch.randn(2, 24, 16),), method=methods[0], where=[0])
    both = tokcompile.optimize(first, method=methods[1], where=[2])
    assert both(torch.randn(2, 24, 16))[:, -1].tolist() == [24, 24]
    assert bool(both.report.recoveries) == (methods != ("tome", "tome"))


TABLE = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("fn", [
    lambda x: (x * TABLE).sum(1) / TABLE.sum(),
    lambda x: x.masked_fill(TABLE < 4, 0).sum(1) / (TABLE >= 4).sum(),
    lambda x: (TABLE.mT * x.mT).mT.float().abs().nansum(1),
    lambda x: torch.linalg.vector_norm((x + TABLE)[..., None], dim=1),
    lambda x: (x * TABLE).mean(1),
    lambda x: x.masked_fill(TABLE < 4, -9).amax(1),
    lambda x: (x - TABLE).max(1).values,
    lambda x: torch.maximum(x * TABLE, x).logsumexp(1),
], ids=["table", "mask", "elsewhere", "norm", "mean", "largest", "largest and where", "exponentials"])  # fmt: skip
def test_sums_with_a_table_take_each_tokens_own_entry(fn):
    """Where all tokens are alike, it makes no difference which of them stands for which."""
    x = extra("B L 16", 2, 7, 1)[:, :1].repeat(1, 7, 1)
    for got in (merge(fn, x), run(reduced(fn, (x,), subset(2, 6, 3, True), 6, prefix=1).gm, x)[0]):
        torch.testing.assert_close(got, fn(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear attention", "softmax by hand", "a gate", "slots"])
def test_shares_of_what_is_left(name):
    x = extra("B L 16", 2, 7, 1)
    index = subset(2, 6, 3, True)
    out = reduced(ALL[name], (x,), index, 6, prefix=1)
    got = run(out.gm, x)[0]
    assert not [r for r in out.recoveries if "adds up" in r.reason]
    if name != "linear attention":  # whose result, a token each, is given back at the end
        kept = torch.stack([x[b, torch.cat([torch.zeros(1, dtype=torch.int64), index[b] + 1])] for b in range(2)])
        torch.testing.assert_close(got, ALL[name](kept), rtol=0, atol=1e-9)


def test_a_norm_that_divides_what_no_sum_is_made_of_is_one_of_all():
    x = extra("B L 16", 2, 7, 1)
    index = subset(2, 6, 3, True)
    for fn, count in (lambda x: x / x.norm(dim=1, keepdim=True), 1), (lambda x: x.sum(1) / x.norm(dim=1), 2):
        out = reduced(fn, (x,), index, 6, prefix=1)  # a root grows otherwise than a sum
        assert [r.reason for r in out.recoveries] == ["it adds up all tokens, and some are gone"] * count


@pytest.mark.parametrize(("divide", "count"), [
    (lambda x: x.sum(1) / ((x > -9).sum(1) + 1), 2),  # counts one too many, however few are left
    (lambda x: x.sum(1) / (x > -9).sum(1).clamp(min=5), 2),
    (lambda x: x.sum(1) / ((x > -9).sum(1).clamp(min=1) + 1e-6), 0),
    (lambda x: ((weights := (QUERIES @ x.mT).exp()) / weights.sum(1, True)) @ x, 1),  # as many queries, by chance
    (lambda x: ((weights := (QUERIES @ x.mT).exp()) / weights.sum(2, True)) @ x, 0),
])  # fmt: skip
def test_shares_are_what_sums_over_the_same_tokens_divide(divide, count):
    out = reduced(divide, (extra("B L 16", 2, 7, 1),), subset(2, 6, 3, True), 6, prefix=1)
    assert [r.reason for r in out.recoveries] == ["it adds up all tokens, and some are gone"] * count


def chained(attention):
    return torch.einsum("bij,bjk->bik", attention, attention)


WEIGHTS = {
    "a softmax": lambda x: x.softmax(1),
    "of two": lambda x: 3 * x.softmax(1) - 2 * (x * 2).softmax(1),
    "times values": lambda x: x.mT.softmax(-1).mT * torch.ones(7, 1, dtype=torch.float64),
    "a root of a square": lambda x: (x.softmax(1) * x.softmax(1)).sqrt(),
    "logarithms": lambda x: x.log_softmax(1).exp(),
    "map of a map": lambda x: chained((x @ x.mT).softmax(-1)).mT[..., :1].expand(-1, -1, 16),
    "mixed": lambda x: x.softmax(1) @ torch.full((16, 16), 1 / 16, dtype=torch.float64),
    "flattened": lambda x: x[..., :1].expand(-1, -1, 16).mT.flatten(1).softmax(1).view(2, 16, 7).mT * 16,
}


@pytest.mark.parametrize("outputs", ["keep", "reduced"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_given_back_still_sum_to_one(name, outputs):
    """A token that stands for several shares its weight out among these, in an op that wants all of them and in an output."""
    x, index, whole = extra("B L 16", 2, 7, 1), subset(2, 6, 3, True), outputs == "keep"
    fn = WEIGHTS[name] if whole else lambda x: WEIGHTS[name](x).flip(1)
    dropped = run(reduced(fn, (x,), index, 6, prefix=1, outputs=outputs).gm, x)[0]
    for got in (dropped, merge(fn, x, outputs=outputs)):
        torch.testing.assert_close(got.sum(1), torch.ones(2, 16, dtype=torch.float64), rtol=0, atol=1e-6)
        assert got.shape == x.shape


def test_merged_tokens_are_given_back_to_their_members():
    x = extra("B L 16", 2, 7, 1)
    rows = merged_rows(x)
    got = merge(lambda x: x.flip(1), x).flip(1)
    for b in range(2):
        for slot, i in enumerate(MERGE["index"][b].tolist()):
            torch.testing.assert_close(got[b, i], rows[b, slot], rtol=0, atol=1e-6)
        for source, slot in zip(MERGE["sources"][b].tolist(), MERGE["slots"][b].tolist()):
            torch.testing.assert_close(got[b, source], rows[b, slot], rtol=0, atol=1e-6)
