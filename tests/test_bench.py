"""Paired timing: the ratios on a clock that the test winds, and the programs that are put beside each other."""

import functools
import io
import json
import sys

import pytest
import torch
from torch import nn

import tokcompile
from tests.models.family import seeded
from tests.shared import shared
from tokcompile import bench, timing
from tokcompile.errors import InputError, MethodError


class Clock:
    """Time passes only in runs; `order` says which ones were made."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def run(self, name, *seconds):
        """A run that takes these seconds in turn."""
        left = iter(seconds * 1000)

        def one():
            self.order.append(name)
            self.now += next(left)

        return one


class Named(nn.Module):
    """Answers with a dictionary, as the models of transformers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"tokens": self.inner(x)}


@functools.cache
def model():
    with seeded():
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        return shared(encoder), (torch.randn(2, 21, 16),)


def test_ratio_is_the_median_over_pairs_with_quartiles():
    clock = Clock()
    ratio = bench.paired(clock.run("a", 2.0), clock.run("b", 1.0, 1.2, 1.4, 1.6, 5.0), 5, warmup=0, clock=clock)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((0.6, 0.7, 0.8))
    assert (ratio.a, ratio.b) == pytest.approx((2.0, 1.4))
    assert (ratio.pairs, ratio.calls) == (5, 1)
    assert str(ratio) == "0.700 [0.600, 0.800]"


def test_the_order_alternates_and_warms_up_first():
    clock = Clock()
    bench.paired(clock.run("a", 1.0), clock.run("b", 1.0), 3, warmup=2, clock=clock)
    assert "".join(clock.order) == "abab" + "a" + "abbaab"


def test_short_runs_are_repeated_within_one_measurement():
    clock = Clock()
    ratio = bench.paired(clock.run("a", 0.001), clock.run("b", 0.002), 2, warmup=0, least=0.01, clock=clock)
    assert ratio.calls == 10
    assert (ratio.median, ratio.a, ratio.b) == pytest.approx((2.0, 0.001, 0.002))
    assert len(clock.order) == 1 + 2 * 2 * 10


def test_no_pairs_are_refused():
    with pytest.raises(InputError, match="at least one pair"):
        bench.paired(lambda: None, lambda: None, 0)


def test_cpu_time_tells_more_work_from_less():
    ratio = bench.paired(lambda: sum(range(2000)), lambda: sum(range(20000)), 5, least=0.002)
    assert ratio.median > 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    items = range(3)
    assert timing.track(items, "title") is items
    pytest.importorskip("rich", reason="rich is not installed: pip install rich")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(timing.track(items, "a [b]")) == [0, 1, 2]
    assert "a [b]" in terminal.getvalue()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert timing.track(items, "title") is items


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with bench.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="positive number"), bench.torch_threads(0):
        pass


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
def test_runners_run_the_model(runtime):
    if runtime == "onnxruntime":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'tokcompile[onnx]'")
    encoder, args = model()
    optimized = tokcompile.optimize(Named(encoder).eval(), args, method="tome", budget=0.6, where=[1])
    (output,) = bench.runner(optimized, runtime)()
    torch.testing.assert_close(torch.as_tensor(output), optimized(*args)["tokens"], atol=1e-5, rtol=1e-4)


def test_unknown_runtimes_are_refused():
    encoder, args = model()
    optimized = tokcompile.optimize(encoder, args, budget=0.8, where=[1])
    with pytest.raises(InputError, match="runtime 'abacus' is none of eager"):
        bench.runner(optimized, "abacus")
    with pytest.raises(InputError, match="runtime 'abacus' is none of eager"):
        bench.bench(encoder, args, runtimes=["abacus"])


def test_onnx_inputs_are_fed_by_name_or_in_order():
    encoder, args = model()
    optimized = tokcompile.optimize(encoder, args, budget=0.8, where=[1])
    for name in (optimized.input_names[0], "renamed"):
        feed = bench.onnx_feed(optimized, [name])
        assert list(feed) == [name]
        torch.testing.assert_close(torch.as_tensor(feed[name]), args[0])


def test_every_row_stands_beside_random_at_its_own_counts():
    encoder, args = model()
    said = []
    found = bench.bench(encoder, args, methods=["tome", "random"], budgets=[0.6], pairs=1, say=said.append)
    assert [r.method for r in found.rows] == ["random", "tome"]
    assert list(found.aa) == ["eager"]
    random, tome = found.rows
    assert random.selection == 0
    for row in found.rows:
        assert row.overhead == pytest.approx(row.ratio - row.flops_ratio)
        assert row.selection == pytest.approx(row.ratio - row.random_ratio)
        assert row.low <= row.ratio <= row.high
    assert tome.counts[-1] == random.counts[-1] == 13
    assert sum("random at the counts of" in line for line in said) == 2
    assert json.loads(json.dumps(found.data()))["machine"]["inputs"] == ["2x21x16:float32"]


def test_random_at_the_same_counts_is_timed_once():
    encoder, args = model()
    said = []
    bench.bench(encoder, args, methods=["topk", "tome"], budgets=[0.6], where=[1], pairs=1, say=said.append)
    assert sum("eager: random at the counts of" in line for line in said) == 1


def test_what_cannot_be_built_is_an_error_and_the_rest_is_timed():
    encoder, args = model()
    found = bench.bench(encoder, args, methods=["tome"], budgets=[0.5, 0.1], where=[1], pairs=1)
    assert [(r.method, r.budget) for r in found.rows] == [("random", "0.5"), ("tome", "0.5"), ("random", "0.1")]
    assert len(found.errors) == 1
    assert found.errors[0].startswith("tome at 0.1: block 1: 'tome' cannot go from 21 to 2 tokens")


def test_a_runtime_that_fails_is_an_error_and_the_rest_is_timed(monkeypatch):
    def refuse(optimized, runtime, count):
        if optimized.plan.method == "tome":
            raise tokcompile.ExportError("not today")
        return runner(optimized, runtime, count)

    runner = bench.runner
    monkeypatch.setattr(bench, "runner", refuse)
    encoder, args = model()
    found = bench.bench(encoder, args, methods=["tome"], budgets=[0.6], pairs=1)
    assert [r.method for r in found.rows] == ["random"]
    assert found.errors == ["tome at 0.6 in eager: not today"]


def test_method_options_go_to_the_methods_that_have_them():
    encoder, args = model()
    found = bench.bench(encoder, args, methods=["dart"], budgets=[0.5], pairs=1, options={"pivots": 2})
    assert found.errors == []
    assert len(found.rows) == 2
    with pytest.raises(MethodError, match="none of random, tome has an option 'pivots'"):
        bench.bench(encoder, args, options={"pivots": 2})


def test_budgets_have_short_names():
    assert bench.budget_name(0.5) == "0.5"
    assert bench.budget_name(tokcompile.Tokens(9)) == "Tokens(k=9)"
