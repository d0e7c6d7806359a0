"""SparseVLM against plain loops: the raters, what they keep, and what is recycled."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.methods.inputs import run, sequence, site, tokens
from tests.reference.sparsevlm import raters, sparsevlm
from tokcompile.errors import MethodError
from tokcompile.methods.sparsevlm import SPARSEVLM, kept, least, recycled
from tokcompile.primitives import apply


def with_text(batch, n, text, before, after_reductions=None, kind="normal"):
    """Tokens of an image between `before` and `text` text tokens, and the site; the first block had more, if so said."""
    taps = sequence(batch, n, seed=n, kind=kind)
    g = torch.Generator().manual_seed(n)
    whole = after_reductions or n
    given = tokens(SPARSEVLM, taps)
    attention = torch.randn(batch, 2, text, before + n + text, generator=g).softmax(-1)[..., before : before + n]
    words, image = torch.randn(batch, before + text, 16, generator=g), torch.randn(batch, whole, 16, generator=g)
    spans = ((0, before), (before + n, before + n + text)) if before else ((n, n + text),)
    return dataclasses.replace(given, text_attention=attention, text_embeds=words, embeds=image), spans


def compare(given, where, before):
    plan = SPARSEVLM.plan(given, where)
    rows = apply(plan, given.x, None)[0]
    count = kept(where.n, where.k, where.options)
    for b in range(given.x.shape[0]):
        words = raters(given.embeds[b].numpy(), given.text_embeds[b, before:].numpy())
        options = where.options["recycle"], where.options["per_cluster"]
        expected, new = sparsevlm(given.text_attention[b].numpy(), words, given.x[b].numpy(), count, *options)
        assert plan.index[b].tolist() == expected
        assert torch.equal(rows[b, :count], given.x[b, expected[:count]])
        if new:
            torch.testing.assert_close(rows[b, count:].double(), torch.from_numpy(np.stack(new)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"recycle": 0}, {"recycle": 0.8, "per_cluster": 4}, {"recycle": 0.1, "per_cluster": 1}], ids=str
)
@pytest.mark.parametrize(("batch", "n", "text", "before"), [(1, 63, 9, 0), (3, 196, 12, 5), (2, 40, 3, 1)])
def test_equals_the_loops(batch, n, text, before, options):
    given, spans = with_text(batch, n, text, before)
    compare(given, site(SPARSEVLM, n, n // 2, before, text=spans, options=options), before)


def test_raters_are_chosen_by_the_whole_image():
    given, spans = with_text(2, 60, 8, 4, after_reductions=120)
    compare(given, site(SPARSEVLM, 60, 30, 4, text=spans), 4)


def test_the_text_decides_what_is_kept():
    given, spans = with_text(1, 60, 8, 0)
    other = dataclasses.replace(given, text_embeds=given.text_embeds.flip(1))
    where = site(SPARSEVLM, 60, 20, text=spans)
    assert SPARSEVLM.plan(given, where).index.tolist() != SPARSEVLM.plan(other, where).index.tolist()


def test_words_that_are_all_alike_rate_alike():
    given, spans = with_text(1, 40, 6, 0)
    same = dataclasses.replace(given, text_embeds=torch.ones_like(given.text_embeds))
    plan = SPARSEVLM.plan(same, site(SPARSEVLM, 40, 20, text=spans, options={"recycle": 0}))
    expected, _ = sparsevlm(given.text_attention[0].numpy(), range(6), given.x[0].numpy(), 20, 0, 10)
    assert plan.index[0].tolist() == expected


@pytest.mark.parametrize("kind", ["ties", "constant"])
def test_duplicated_tokens_go_to_the_lower_index(kind):
    taps = sequence(3, 40, seed=4, kind=kind)
    where = site(SPARSEVLM, 40, 22)
    plan, rows, _ = run(SPARSEVLM, taps, where)
    for b in range(3):
        attention = taps["text_attention"][b].numpy()
        expected, new = sparsevlm(attention, [0], taps["x"][b].numpy(), kept(40, 22, where.options), 0.3, 10)
        assert plan.index[b].tolist() == expected
        torch.testing.assert_close(rows[b, -len(new) :].double(), torch.from_numpy(np.stack(new)), rtol=0, atol=1e-5)


def test_the_published_counts():
    options = dict(SPARSEVLM.options)
    n = 576
    for count, again, clusters in ((300, 83, 9), (200, 33, 4), (110, 29, 3)):
        assert recycled(n - count, options) == (again, clusters)
        assert kept(n, count + clusters, options) == count
        n = count + clusters
    assert list(SPARSEVLM.steps.at(32, language=True)) == [3, 7, 16]  # the outputs of layers 2, 6 and 15


@pytest.mark.parametrize("options", [{"recycle": 0.3, "per_cluster": 10}, {"recycle": 1.0, "per_cluster": 2}])
def test_every_count_above_the_least_can_be_met(options):
    for n in range(1, 60):
        for k in range(least(n, options), n + 1):
            count = kept(n, k, options)
            assert count + recycled(n - count, options)[1] == k


def test_senseless_options_are_refused():
    for wrong in ({"recycle": 1.5}, {"recycle": -0.1}, {"per_cluster": 0}):
        with pytest.raises(MethodError, match="sparsevlm recycles a share from 0 to 1"):
            run(SPARSEVLM, sequence(1, 8), site(SPARSEVLM, 8, 4, options=wrong))
