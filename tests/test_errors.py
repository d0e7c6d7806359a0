"""Wrong options, budgets, models and inputs are answered in one family of errors: what, where, and what to do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tokcompile
from tests.tiny import LENGTH, WIDTH, Tiny, optimize, tiny
from tokcompile import Flops, KeepRate, Plan, Recipe, Remove, Schedule, Share, Tokens
from tokcompile.errors import (
    BudgetError,
    ExportError,
    InputError,
    MethodError,
    PlanError,
    TokcompileError,
    TraceError,
    UnsupportedGraph,
)
from tokcompile.primitives import identity


@pytest.fixture
def optimized():
    return optimize(tiny())


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "message"), [
    ("tme", r"unknown method 'tme'; did you mean tome, pitome, todre\?"),
    ("topkk", r"unknown method 'topkk'; did you mean topk\?"),
    ("xyz", r"unknown method 'xyz'; there are aim, dart, .*, tome, topk, vatp, visionzip"),
], ids=["two", "one", "far"])  # fmt: skip
def test_an_unknown_method_is_answered_with_the_nearest(method, message):
    with pytest.raises(MethodError, match=message):
        optimize(tiny(), method=method)


@pytest.mark.parametrize(("options", "message"), [
    (dict(method="random", sead=1), r"method 'random' has no option 'sead'; did you mean seed\?"),
    (dict(method="divprune", seed=1), r"method 'divprune' has no option 'seed'; it has none"),
    (dict(method="pitome", depth=1), r"method 'pitome' has no option 'depth'; it has margin, alpha, variant, proportional"),
    (dict(method="random", seed="a"), r"random's seed takes an int \(0 by default\), not 'a'"),
    (dict(method="dart", pivots=2.5), r"dart's pivots takes an int \(4 by default\), not 2.5"),
    (dict(plan=Plan("random", options={"seed": True})), r"random's seed takes an int \(0 by default\), not True"),
], ids=["near", "none", "far", "text", "float", "plan"])  # fmt: skip
def test_a_wrong_option_is_answered_with_the_right_ones(options, message):
    with pytest.raises(MethodError, match=message):
        optimize(tiny(), **options)


def test_options_of_the_same_kind_are_taken():
    made = Recipe("made", lambda tokens, site: None, options={"rate": 0.5, "grid": (2, 2), "shape": None, "norm": torch.norm})
    given = {"rate": 1, "grid": [3, 3], "shape": "any", "norm": torch.sum, "renumber": True}
    assert made.with_options(given) == given


@pytest.mark.parametrize(("options", "message"), [
    (dict(outputs="short"), r"outputs='short' is none of 'keep', 'reduced'"),
    (dict(recover="always"), r"recover='always' is none of 'end', 'anywhere', 'never'"),
], ids=["outputs", "recover"])  # fmt: skip
def test_a_wrong_choice_is_answered_with_the_choices(options, message):
    with pytest.raises(InputError, match=message):
        optimize(tiny(), **options)


def test_a_recipe_is_checked():
    with pytest.raises(MethodError, match=r"recipe 'r' reads unknown taps \['keys'\]; there are x, normed, q, k, v"):
        Recipe("r", lambda tokens, site: None, taps=("keys",))
    with pytest.raises(MethodError, match=r"recipe 'r' has place 'mlp'; it is 'attention' or 'block'"):
        Recipe("r", lambda tokens, site: None, place="mlp")
    with pytest.raises(MethodError, match="register_method takes a Recipe, not str"):
        tokcompile.register_method("tome")


def test_a_recipe_that_returns_another_count_is_refused():
    greedy = Recipe("greedy", lambda tokens, site: tokcompile.Keep(torch.arange(3).expand(tokens.x.shape[0], -1)))
    with pytest.raises(MethodError, match=r"'greedy' was asked for \d+ of \d+ tokens and gave indices of shape \(1, 3\)"):
        optimize(tiny(), method=greedy)
    few = lambda tokens, site: tokcompile.Keep(identity(tokens.x)[:, : site.k], assign=identity(tokens.x)[:, : site.k])  # noqa: E731
    with pytest.raises(
        MethodError, match=r"'few' says what stands for each of 12 tokens in the shape \(1, 6\); it is \(1, 12\)"
    ):
        optimize(tiny(), method=Recipe("few", few), where=[0])


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: 0, r"budget must be a share in \(0, 1\], not 0.0"),
    (lambda: 1.5, r"budget must be a share in \(0, 1\], not 1.5"),
    (lambda: -0.5, r"budget must be a share in \(0, 1\], not -0.5"),
    (lambda: 98, r"budget 98 is not a share in \(0, 1\]; for 98 tokens write Tokens\(98\)"),
    (lambda: float("nan"), r"budget must be a share in \(0, 1\], not nan"),
    (lambda: True, r"budget True is not a share in \(0, 1\], nor Tokens\(k\)"),
    (lambda: "half", r"budget 'half' is not a share"),
    (lambda: Share("0.5"), r"budget must be a share in \(0, 1\], not '0.5'"),
    (lambda: Flops(0), r"Flops\(ratio\) must be a share in \(0, 1\], not 0"),
    (lambda: KeepRate(2), r"KeepRate\(rate\) must be a share in \(0, 1\], not 2"),
    (lambda: Tokens(-1), r"Tokens\(k\) takes a non-negative integer, not -1"),
    (lambda: Tokens(0), r"block 2: all tokens can be dropped only in a language model, where text is left beside them"),
    (lambda: Tokens(7.0), r"Tokens\(k\) takes a non-negative integer, not 7.0"),
    (lambda: Tokens(13), r"Tokens\(13\) is more than the 12 tokens there are"),
    (lambda: Remove(-1), r"Remove\(r\) takes a non-negative integer, not -1"),
    (lambda: Remove(2, inflect=2), r"Remove\(inflect=2\) is outside \[-1, 1\]"),
    (lambda: Remove(2, inflect="late"), r"Remove\(inflect='late'\) is outside \[-1, 1\]"),
    (lambda: Schedule({}), r"Schedule\(\{block: k\}\) is empty"),
    (lambda: Schedule([4]), r"Schedule takes \{block: k\}, not \[4\]"),
    (lambda: Schedule({0: -1}), r"Schedule maps block numbers to token counts, not 0: -1"),
    (lambda: Schedule({True: 4}), r"Schedule maps block numbers to token counts, not True: 4"),
    (lambda: Schedule({0: 13}), r"block 0: 12 tokens come in, 13 cannot be left"),
    (lambda: Schedule({0: 6, 1: 8}), r"block 1: 6 tokens come in, 8 cannot be left"),
], ids=lambda v: None if callable(v) else v[:24])  # fmt: skip
def test_an_impossible_budget_is_refused(make, message):
    with pytest.raises(BudgetError, match=message):
        optimize(tiny(), budget=make())


def test_a_method_that_cannot_meet_the_budget_says_what_it_can():
    with pytest.raises(BudgetError, match=r"block 2: 'tome' cannot go from 12 to 3 tokens in one step, only to 6; "
                       r"spread the budget over more blocks \(where=...\) or raise it"):  # fmt: skip
        optimize(tiny(), method="tome", budget=Tokens(3), where=2)


def test_flops_that_cannot_be_reached_name_what_remains():
    with pytest.raises(BudgetError, match=r"Flops\(0.1\) cannot be met: even with 1 token left .* remain \(reductions at "
                       r"blocks \[2\]\); reduce earlier \(where=...\) or raise the budget"):  # fmt: skip
        optimize(tiny(), budget=Flops(0.1), where=2)


@pytest.mark.parametrize(("options", "message"), [
    (dict(where=[3]), r"block 3 is not among the 3 blocks found \(0 to 2\)"),
    (dict(where=[-4]), r"block -4 is not among the 3 blocks found"),
    (dict(where="blocks.7"), r"no block has the path 'blocks.7'; there are blocks.0, blocks.1, blocks.2"),
    (dict(budget=Schedule({9: 4})), r"block 9 is not among the 3 blocks found"),
    (dict(where=[]), r"where=\[\] names no block"),
], ids=["high", "low", "path", "schedule", "none"])  # fmt: skip
def test_where_out_of_range(options, message):
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), **options)


def test_blocks_may_be_named_in_any_order():
    plan = optimize(tiny(), method="random", where=[2, "blocks.0", 0]).plan
    assert plan.reductions == optimize(tiny(), method="random", where=[0, 2]).plan.reductions


@pytest.mark.parametrize(("options", "message"), [
    (dict(where=1.5), "where=1.5 is no block"),
    (dict(size_weighted_mean="x"), "size_weighted_mean='x' is neither True nor False"),
    (dict(spans=(5, 12)), r"spans=\(5, 12\) is no list of \(start, stop\)"),
    (dict(spans=[("1", 5)]), "is no list of"),
    (dict(spans=3), "spans=3 is no list of"),
    (dict(spans=[]), r"spans=\[\] names no visual tokens"),
], ids=["where", "mean", "pair", "text", "number", "none"])  # fmt: skip
def test_places_and_switches_of_another_kind(options, message):
    with pytest.raises(InputError, match=message):
        optimize(tiny(), **options)


@pytest.mark.parametrize("spans", [[(5, 13)], [(-1, 5)], [(6, 6)], [(6, 3)], [(0, 6), (4, 8)], [(6, 9), (0, 3)]], ids=str)
def test_spans_out_of_range(spans):
    with pytest.raises(BudgetError, match=r"span \(.*\) does not lie within the 12 tokens of block \d, or spans overlap or"):
        optimize(tiny(), spans=spans)


# -- models and inputs -------------------------------------------------------------------------------------------------


def linear(model):
    model.before = nn.Linear(WIDTH, WIDTH).eval()


@pytest.mark.parametrize(("change", "args", "message"), [
    (None, None, r"pass example inputs: tokcompile.optimize\(model, \(example,\)\) or kwargs=\{...\}"),
    (None, torch.randn(1, LENGTH, WIDTH), r"args must be a tuple of example inputs, not Tensor: write \(x,\) for a single one"),
    (None, (torch.randn(1, LENGTH, 7),), r"the model does not run on the example inputs: RuntimeError[\s\S]*what to do"),
    (None, (torch.randn(1, LENGTH, WIDTH), 3), r"the model does not run on the example inputs: TypeError"),
    (linear, (torch.randn(1, LENGTH, 7),), r"the model does not run on the example inputs: RuntimeError: mat1 and mat2 sh"),
    (linear, (torch.randn(1, LENGTH, WIDTH).double(),), r"does not run on the example inputs: RuntimeError: .*dtype"),
    (nn.Module.train, (torch.randn(1, LENGTH, WIDTH),), r"training mode \(module 'Tiny'\)[\s\S]*Call model.eval\(\) first"),
    (lambda m: m.blocks[1].train(), (torch.randn(1, LENGTH, WIDTH),), r"training mode \(module 'blocks.1'\)"),
], ids=["missing", "not-a-tuple", "wrong-shape", "too-many", "product", "dtype", "training", "partly-training"])  # fmt: skip
def test_inputs_that_do_not_fit(change, args, message, logged):
    model = Tiny().eval()
    if change:
        change(model)
    with pytest.raises(InputError, match=message):
        tokcompile.optimize(model, args)
    assert logged == []


@pytest.mark.parametrize("model", [3, None, {}, lambda x: x], ids=["int", "none", "dict", "function"])
def test_what_is_not_a_model(model):
    with pytest.raises(InputError, match=r"model must be an nn\.Module, an ExportedProgram or the path of a \.pt2, not"):
        tokcompile.optimize(model, (torch.zeros(1),))


def test_a_program_and_inputs_of_another_structure():
    model, args = tiny()
    program = torch.export.export(model, args)
    with pytest.raises(InputError, match=r"do not have the structure the program was exported with:\n  given"):
        tokcompile.optimize(program, (*args, *args))
    for other in (torch.randn(2, LENGTH, WIDTH), args[0].double()):
        with pytest.raises(InputError, match=r"'x' is \(\d, 12, 16\) .* exported for \(1, 12, 16\) .*\n.*export it again"):
            tokcompile.optimize(program, (other,))
    with pytest.raises(InputError, match=r"in training mode[\s\S]*Pass the ExportedProgram, not its module\(\)"):
        tokcompile.optimize(program.module(), args)


def test_keywords_and_modules_of_another_kind():
    model, args = tiny()
    with pytest.raises(InputError, match="kwargs must be a dict of example inputs, not list"):
        tokcompile.optimize(model, args, [1])
    with pytest.raises(InputError, match=r"does not read TorchScript: pass the nn.Module"):
        tokcompile.optimize(torch.jit.trace(nn.Linear(WIDTH, 2), args), args)


def test_a_dynamic_program_is_refused():
    model, _ = tiny()
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = torch.export.export(model, (torch.randn(2, LENGTH, WIDTH),), dynamic_shapes=shapes)
    with pytest.raises(UnsupportedGraph, match=r"input 'x' has a dynamic shape: dimension 0 is s\d+[\s\S]*"
                       r"what to do: export with static shapes; for several sizes optimize once per size"):  # fmt: skip
        tokcompile.optimize(program)


def test_a_model_without_attention():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with pytest.raises(UnsupportedGraph, match=r"no residual attention block was found in this model[\s\S]*what to do"):
        tokcompile.optimize(model, (torch.randn(1, 3, 8, 8),))


class Branching(nn.Module):
    def forward(self, x):
        return x[x > x.mean()].sum() + torch.nonzero(x > 0).shape[0] * (x.sum() > 0)


def test_data_dependent_shapes_are_recorded_or_refused():
    with pytest.raises(TokcompileError, match=r"no residual attention block|cannot trace this model"):
        tokcompile.optimize(Branching().eval(), (torch.randn(4, 4),))


class Untraceable(nn.Module):
    """Different on every call, so that a replay must be out of step."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        for _ in range(self.calls):
            x = x * float(x.sum().item())
        return x


class Wrapped(nn.Module):
    def forward(self, x):
        return SimpleNamespace(x=x)


def test_what_cannot_be_traced_says_so():
    with pytest.raises(TraceError, match=r"torch.export cannot trace this model[\s\S]*read back into Python[\s\S]*what to do"):
        tokcompile.optimize(Untraceable().eval(), (torch.randn(4, 4),))
    with pytest.raises(TraceError, match=r"returns an object of <class '\w+.SimpleNamespace'>[\s\S]*register_dataclass"):
        tokcompile.optimize(Wrapped().eval(), (torch.zeros(1),))


# -- later calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "message"), [
    ((torch.randn(2, LENGTH, WIDTH),), r"input 0 is \(2, 12, 16\) torch.float32, but .* compiled for \(1, 12, 16\)"),
    ((torch.randn(1, 13, WIDTH),), r"shapes and budgets are static, optimize once per input shape"),
    ((torch.randn(1, LENGTH, WIDTH).double(),), r"torch.float64, but the model was compiled for .* torch.float32"),
    ((), r"called with other arguments than it was compiled for"),
    ((torch.randn(1, LENGTH, WIDTH),) * 2, r"called with other arguments than it was compiled for"),
    (([torch.randn(1, LENGTH, WIDTH)],), r"called with other arguments than it was compiled for:\n  given    TreeSpec"),
    ((torch.randn(1, LENGTH, WIDTH).numpy(),), r"input 0 is of type ndarray, but the model was compiled for a tensor"),
], ids=["batch", "length", "dtype", "none", "two", "list", "array"])  # fmt: skip
def test_a_later_call_must_be_like_the_first(args, message, optimized):
    with pytest.raises(InputError, match=message):
        optimized(*args)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.to("cpu", torch.bfloat16)])
def test_another_dtype(change, optimized):
    with pytest.raises(InputError, match="dtype of an optimized model is fixed: convert the original"):
        change(optimized)
    assert optimized.to("cpu") is optimized
    assert {p.dtype for p in optimized.parameters()} == {torch.float32}


def test_a_later_call_with_an_unknown_keyword(optimized):
    with pytest.raises(InputError, match=r"called with other arguments[\s\S]*given +1 by position, and by name y\n +expected"):
        optimized(optimized.example_inputs[0], y=1)


def test_a_number_instead_of_a_tensor(optimized):
    with pytest.raises(InputError, match=r"input 0 is of type int, but the model was compiled for a tensor"):
        optimized(3)


# -- the family itself -------------------------------------------------------------------------------------------------


def test_one_family_catches_all():
    for kind in (BudgetError, ExportError, InputError, MethodError, PlanError, TraceError, UnsupportedGraph):
        assert issubclass(kind, TokcompileError)
    for kind in (BudgetError, InputError, MethodError, PlanError):
        assert issubclass(kind, ValueError)


def test_check_refuses_what_shows_nothing():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tiny()

        def forward(self, x):
            return self.body(x) * 0

    with pytest.raises(InputError, match="the outputs do not depend on the inputs: nothing can be compared"):
        tokcompile.check(Constant().eval(), (torch.randn(1, LENGTH, WIDTH),))
