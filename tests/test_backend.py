"""The backend of torch.compile: the numbers of `optimize`, and errors that say what to do."""

import pytest
import torch
from torch import nn

from tests.tiny import optimize, tiny
from tokcompile import InputError, MethodError, Plan, PlanError, Reduction, UnsupportedGraph
from tokcompile.backend import backend

PLAN = Plan("random", (Reduction(0, 12, 6),))


def compiled(model, args, dynamic=False, **options):
    torch.compiler.reset()
    fast = torch.compile(model, backend="tokcompile", fullgraph=True, dynamic=dynamic, options={"inner": "eager", **options})
    with torch.no_grad():
        return fast(*args)


@pytest.mark.parametrize("options", [dict(method="topk", budget=0.5), dict(plan=PLAN)], ids=["method", "plan"])
def test_it_gives_the_numbers_of_optimize(options):
    want = optimize(tiny(), **options)
    assert torch.equal(compiled(*tiny(), **options), want(*tiny()[1]))


def test_an_optimized_model_goes_through_torch_compile():
    fast = optimize(tiny(), method="tome", where=[1])
    got = torch.compile(fast, backend="eager", fullgraph=True, dynamic=False)(*tiny()[1])
    torch.testing.assert_close(got, fast(*tiny()[1]))


@pytest.mark.parametrize(("options", "kind", "message"), [
    (dict(method="tme"), MethodError, "unknown method 'tme'; did you mean"),
    (dict(method="random", seed="a"), MethodError, r"random's seed takes an int \(0 by default\), not 'a'"),
    (dict(outputs="reduced"), InputError, "outputs='reduced': torch.compile returns what the model returns"),
    (dict(plan=PLAN.replace(outputs="reduced")), InputError, "outputs='reduced': torch.compile returns"),
    (dict(plan=PLAN, method="grid", where=[1]), PlanError, "options has both a plan and method, where"),
    (dict(inner="nothing"), InputError, "inner='nothing' is not a torch.compile backend"),
], ids=["method", "option", "outputs", "plan-outputs", "plan", "inner"])  # fmt: skip
def test_options_are_refused_before_the_graph_is_looked_at(options, kind, message):
    with pytest.raises(kind, match=message):
        backend(nn.Identity(), [], options)


@pytest.mark.parametrize(("dynamic", "kind", "message"), [
    (True, InputError, "InputError: the shapes are dynamic: compile with dynamic=False"),
    (False, UnsupportedGraph, "UnsupportedGraph: this piece of the model holds no attention block"),
], ids=["dynamic", "no-blocks"])  # fmt: skip
def test_refusals_come_through_torch_compile(dynamic, kind, message):
    with pytest.raises(Exception, match=message) as caught:
        compiled(nn.Linear(4, 4), (torch.zeros(3, 4),), dynamic=dynamic)
    assert isinstance(caught.value.inner_exception, kind)
