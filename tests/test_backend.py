"""The backend of torch.compile: the numbers of `optimize`, and errors that say what to do."""

import pytest
import torch
from torch import nn

import tokcompile
from tests.tiny import optimize, tiny
from tokcompile import Plan, Reduction

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


@pytest.mark.parametrize(("options", "message"), [
    (dict(method="tme"), "MethodError: unknown method 'tme'; did you mean"),
    (dict(outputs="reduced"), "InputError: outputs='reduced': torch.compile returns what the model returns"),
    (dict(plan=PLAN.replace(outputs="reduced")), "InputError: outputs='reduced': torch.compile returns"),
    (dict(plan=PLAN, method="grid", where=[1]), "PlanError: options has both a plan and method, where"),
    (dict(inner="nothing"), "InputError: inner='nothing' is not a torch.compile backend"),
    (dict(dynamic=True), "InputError: the shapes are dynamic: compile with dynamic=False"),
], ids=["method", "outputs", "plan-outputs", "plan", "inner", "dynamic"])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(Exception, match=message) as caught:
        compiled(*tiny(), **options)
    assert isinstance(caught.value.inner_exception, tokcompile.TokcompileError)


def test_a_piece_without_blocks_is_refused():
    with pytest.raises(Exception, match="holds no attention block"):
        compiled(nn.Linear(4, 4), (torch.zeros(1, 4),))
