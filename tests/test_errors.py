"""What goes wrong is said in one family of errors: the right class, what, where, what to do, and no half-written file."""

import io
import json
import zipfile

import pytest
import torch
from torch import nn

import tokcompile
from tests.conftest import run
from tests.models import FAMILIES
from tokcompile import Flops, KeepRate, Plan, Recipe, Reduction, Remove, Schedule, Share, Tokens
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

WIDTH, LENGTH = 16, 12


class Block(nn.Module):
    """A pre-norm block; `between` is applied to the tokens between its attention and its MLP."""

    def __init__(self, between=None):
        super().__init__()
        self.between = between
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
        if self.between is not None:
            x = self.between(x)
        return x + self.mlp(self.norm2(x))


class Tiny(nn.Module):
    """Three blocks over LENGTH tokens; what stands `between` is in the middle one."""

    def __init__(self, between=None, before=None):
        super().__init__()
        self.before = before
        self.blocks = nn.ModuleList([Block(), Block(between), Block()])

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x


def tiny(between=None, before=None):
    return Tiny(between, before).eval(), (torch.randn(1, LENGTH, WIDTH),)


def optimize(model_and_args, **options):
    return tokcompile.optimize(*model_and_args, **{"method": "random", **options})


@pytest.fixture
def optimized():
    return optimize(tiny())


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "message"), [
    ("tme", r"unknown method 'tme'; did you mean tome, pitome\?"),
    ("topkk", r"unknown method 'topkk'; did you mean topk\?"),
    ("xyz", r"unknown method 'xyz'; there are dart, divprune, evit, grid, pitome, random, tome, topk"),
], ids=["two", "one", "far"])  # fmt: skip
def test_an_unknown_method_is_answered_with_the_nearest(method, message):
    with pytest.raises(MethodError, match=message):
        optimize(tiny(), method=method)


@pytest.mark.parametrize(("options", "message"), [
    (dict(method="random", sead=1), r"method 'random' has no option 'sead'; did you mean seed\?"),
    (dict(method="grid", seed=1), r"method 'grid' has no option 'seed'; it has none"),
    (dict(method="pitome", depth=1), r"method 'pitome' has no option 'depth'; it has margin, alpha, variant, proportional"),
], ids=["near", "none", "far"])  # fmt: skip
def test_an_unknown_option_is_answered_with_the_known_ones(options, message):
    with pytest.raises(MethodError, match=message):
        optimize(tiny(), **options)


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


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: 0, r"budget must be a share in \(0, 1\], not 0.0"),
    (lambda: 1.5, r"budget must be a share in \(0, 1\], not 1.5"),
    (lambda: -0.5, r"budget must be a share in \(0, 1\], not -0.5"),
    (lambda: float("nan"), r"budget must be a share in \(0, 1\], not nan"),
    (lambda: True, r"budget True is not a share in \(0, 1\], nor Tokens\(k\)"),
    (lambda: "half", r"budget 'half' is not a share"),
    (lambda: Share("0.5"), r"budget must be a share in \(0, 1\], not '0.5'"),
    (lambda: Flops(0), r"Flops\(ratio\) must be a share in \(0, 1\], not 0"),
    (lambda: KeepRate(2), r"KeepRate\(rate\) must be a share in \(0, 1\], not 2"),
    (lambda: Tokens(0), r"Tokens\(k\) takes a positive integer, not 0"),
    (lambda: Tokens(7.0), r"Tokens\(k\) takes a positive integer, not 7.0"),
    (lambda: Tokens(13), r"Tokens\(13\) is more than the 12 tokens there are"),
    (lambda: Remove(-1), r"Remove\(r\) takes a non-negative integer, not -1"),
    (lambda: Remove(2, inflect=2), r"Remove\(inflect=2\) is outside \[-1, 1\]"),
    (lambda: Schedule({}), r"Schedule\(\{block: k\}\) is empty"),
    (lambda: Schedule({0: 0}), r"Schedule maps block numbers to positive token counts, not 0: 0"),
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
], ids=["high", "low", "path", "schedule"])  # fmt: skip
def test_where_out_of_range(options, message):
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), **options)


@pytest.mark.parametrize("spans", [[(5, 13)], [(-1, 5)], [(6, 6)], [(6, 3)], [(0, 6), (4, 8)], [(6, 9), (0, 3)]], ids=str)
def test_spans_out_of_range(spans):
    with pytest.raises(BudgetError, match=r"span \(.*\) does not lie within the 12 tokens of block \d, or spans overlap or"):
        optimize(tiny(), spans=spans)


# -- models and inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "args", "message"), [
    (None, None, r"pass example inputs: tokcompile.optimize\(model, \(example,\)\) or kwargs=\{...\}"),
    (None, torch.randn(1, LENGTH, WIDTH), r"args must be a tuple of example inputs, not Tensor: write \(x,\) for a single one"),
    (None, (torch.randn(1, LENGTH, 7),), r"the model does not run on the example inputs: RuntimeError[\s\S]*what to do"),
    (None, (torch.randn(1, LENGTH, WIDTH), 3), r"the model does not run on the example inputs: TypeError"),
    (nn.Module.train, (torch.randn(1, LENGTH, WIDTH),), r"training mode \(module 'Tiny'\)[\s\S]*Call model.eval\(\) first"),
    (lambda m: m.blocks[1].train(), (torch.randn(1, LENGTH, WIDTH),), r"training mode \(module 'blocks.1'\)"),
], ids=["missing", "not-a-tuple", "wrong-shape", "too-many", "training", "partly-training"])  # fmt: skip
def test_inputs_that_do_not_fit(change, args, message):
    model = Tiny().eval()
    if change:
        change(model)
    with pytest.raises(InputError, match=message):
        tokcompile.optimize(model, args)


@pytest.mark.parametrize("model", [3, None, {}, lambda x: x], ids=["int", "none", "dict", "function"])
def test_what_is_not_a_model(model):
    with pytest.raises(InputError, match=r"model must be an nn\.Module, an ExportedProgram or the path of a \.pt2, not"):
        tokcompile.optimize(model, (torch.zeros(1),))


def test_a_program_and_inputs_of_another_structure():
    model, args = tiny()
    program = torch.export.export(model, args)
    with pytest.raises(InputError, match=r"do not have the structure the program was exported with:\n  given"):
        tokcompile.optimize(program, (*args, *args))


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


def test_what_cannot_be_traced_says_so():
    with pytest.raises(TraceError, match=r"torch.export cannot trace this model[\s\S]*read back into Python[\s\S]*what to do"):
        tokcompile.optimize(Untraceable().eval(), (torch.randn(4, 4),))


# -- later calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "message"), [
    ((torch.randn(2, LENGTH, WIDTH),), r"input 0 is \(2, 12, 16\) torch.float32, but .* compiled for \(1, 12, 16\)"),
    ((torch.randn(1, 13, WIDTH),), r"shapes and budgets are static, optimize once per input shape"),
    ((torch.randn(1, LENGTH, WIDTH).double(),), r"torch.float64, but the model was compiled for .* torch.float32"),
    ((), r"called with other arguments than it was compiled for"),
    ((torch.randn(1, LENGTH, WIDTH),) * 2, r"called with other arguments than it was compiled for"),
    (([torch.randn(1, LENGTH, WIDTH)],), r"called with other arguments than it was compiled for"),
], ids=["batch", "length", "dtype", "none", "two", "list"])  # fmt: skip
def test_a_later_call_must_be_like_the_first(args, message, optimized):
    with pytest.raises(InputError, match=message):
        optimized(*args)


def test_a_later_call_with_an_unknown_keyword(optimized):
    with pytest.raises(InputError, match=r"called with other arguments[\s\S]*given[\s\S]*'y'[\s\S]*expected"):
        optimized(optimized.example_inputs[0], y=1)


def test_a_number_instead_of_a_tensor(optimized):
    with pytest.raises(InputError, match=r"input 0 is 3, but the model was compiled for"):
        optimized(3)


# -- graphs the pass refuses -------------------------------------------------------------------------------------------

torch.library.define("tokcompile_tests::swirl", "(Tensor x) -> Tensor")
torch.library.impl("tokcompile_tests::swirl", "CompositeExplicitAutograd", lambda x: x * 1.5)


def swirl(x):
    return torch.ops.tokcompile_tests.swirl(x)


def test_an_op_without_a_rule_is_named_with_its_place():
    with pytest.raises(UnsupportedGraph) as refusal:
        optimize(tiny(swirl), where=0)
    message = str(refusal.value)
    assert message.startswith("an op over reduced tokens cannot be rewritten: there is no rule for it (")
    assert "[1, Seq(s0:12->6), 16]" in message
    assert "node: swirl = tokcompile_tests.swirl.default(1x12x16)" in message
    assert "module: blocks.1" in message
    assert "test_errors.py:" in message
    assert "what to do: tell the pass what it does: tokcompile.register_rule('tokcompile_tests.swirl', rule)" in message
    assert "recover='anywhere'" in message


def test_register_rule_makes_the_op_known(monkeypatch):
    monkeypatch.setattr("tokcompile.passes.rules.core.RULES", rules := dict(tokcompile.passes.rules.RULES))
    monkeypatch.setattr("tokcompile.passes.rewrite.RULES", rules)
    tokcompile.register_rule("tokcompile_tests::swirl", lambda call: call.emit(call.label("x")))
    model, args = tiny(swirl)
    assert tokcompile.check(model, args).ok
    reduced = tokcompile.optimize(model, args, method="random", where=0)
    assert reduced.report.recoveries == []
    by_hand = tokcompile.optimize(tiny_with_weights_of(model, lambda x: x * 1.5), args, method="random", where=0)
    assert torch.equal(run(reduced, *args), run(by_hand, *args))


def tiny_with_weights_of(model, between):
    other = Tiny(between).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_rule_must_be_callable():
    with pytest.raises(TokcompileError, match=r"the rule for 'my\.op' must be callable, not str"):
        tokcompile.register_rule("my::op", "pointwise")


def test_a_rule_with_a_wrong_label_is_caught_at_its_node(monkeypatch):
    rules = {**tokcompile.passes.rules.RULES, "tokcompile_tests.swirl": lambda call: call.emit(((1,), (5,), (16,)))}
    monkeypatch.setattr("tokcompile.passes.rewrite.RULES", rules)
    with pytest.raises(
        UnsupportedGraph, match=r"the rule for this op gives \(1, 6, 16\), its label says \(1, 5, 16\)[\s\S]*swirl"
    ):
        optimize(tiny(swirl), where=0)


@pytest.mark.parametrize(("between", "op"), [
    (lambda x: x.cumsum(1), "aten.cumsum"),
    (lambda x: x.flip(1), "aten.flip"),
    (lambda x: x.roll(1, 1), "aten.roll"),
    (lambda x: x.sort(1).values, "aten.sort"),
    (lambda x: x + x.var(1, keepdim=True), "aten.var"),
    (lambda x: nn.functional.conv1d(x.transpose(1, 2), torch.ones(WIDTH, WIDTH, 3), padding=1).transpose(1, 2), "aten.conv1d"),
], ids=lambda v: v[5:] if isinstance(v, str) else "op")  # fmt: skip
def test_ops_that_need_all_tokens_inside_the_blocks(between, op):
    """Refused with the way out, which then works."""
    with pytest.raises(UnsupportedGraph) as refusal:
        optimize(tiny(between), where=0)
    message = str(refusal.value)
    for part in (
        f"= {op}.",
        "module: blocks.1",
        "source: ",
        "pass recover='anywhere'",
        "reduce only after it (where=[later blocks])",
    ):
        assert part in message
    with pytest.raises(UnsupportedGraph, match="cannot be rewritten"):
        optimize(tiny(between), where=0, recover="never")
    recovered = optimize(tiny(between), where=0, recover="anywhere")
    assert [(r["inside"], r["op"]) for r in recovered.report.recoveries] == [(True, op)]
    assert optimize(tiny(between), where=2).report.recoveries == []


def test_never_recovering_refuses_even_the_end():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tiny()

        def forward(self, x):
            return self.body(x).cumsum(1)

    head = (Head().eval(), (torch.randn(1, LENGTH, WIDTH),))
    assert [r["inside"] for r in optimize(head).report.recoveries] == [False]
    with pytest.raises(UnsupportedGraph, match=r"it gives positions of tokens[\s\S]*cumsum"):
        optimize(head, recover="never")


@pytest.mark.parametrize("between", [lambda x: x + torch.rand_like(x), lambda x: nn.functional.dropout(x, 0.5, True),
                                     lambda x: x + torch.randn(1, LENGTH, WIDTH)],
                         ids=["rand_like", "dropout", "randn"])  # fmt: skip
def test_random_ops_are_refused(between):
    with pytest.raises(UnsupportedGraph, match=r"the model draws random numbers at inference\n  node: \w+ = aten\.[\s\S]*"
                       r"what to do: optimize the part of the model after the random step"):  # fmt: skip
        optimize(tiny(between))


def aliased(x):
    y = x * 1
    z = y.transpose(1, 2)
    z.add_(1)
    return y


def test_in_place_on_shared_memory_is_refused():
    with pytest.raises(UnsupportedGraph, match=r"an in-place op changes memory that other values share\n  node: add__?\w* = aten.add_"  # noqa: E501
                       r"[\s\S]*module: blocks.1[\s\S]*what to do: write it out of place"):  # fmt: skip
        optimize(tiny(aliased))


def autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ torch.ones(WIDTH, WIDTH)


def test_autocast_inside_is_refused():
    with pytest.raises(
        UnsupportedGraph, match=r"turns autocast on inside its forward[\s\S]*convert the model's weights and inputs"
    ):
        optimize(tiny(autocast))


def test_a_method_that_reads_attention_before_the_first_block():
    with pytest.raises(TokcompileError, match=r"reads the attention"):
        optimize(tiny(), method="dart", where=0)
    assert [r.block for r in optimize(tiny(), method="dart").plan.reductions] == [1]


def test_blocks_of_two_stages_do_not_go_together():
    model, args, _ = FAMILIES["timm/pit"].build(1)
    with pytest.raises(
        UnsupportedGraph,
        match=r"hold \[\d+, \d+\] tokens: one method works within one stage[\s\S]*choose one stage: where=",
    ):
        tokcompile.optimize(model, args, method="random", where=[0, 2])


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "message"), [
    ("{", "this is not a tokcompile plan: Expecting property name"),
    ("[]", "it has no 'method' and 'reductions'"),
    ("{}", "it has no 'method' and 'reductions'"),
    ('{"method": "tome", "reductions": [], "version": 0}', "plan version 0 is not the version 1 that this release reads"),
    ('{"method": "tome", "reductions": []}', "plan version None is not the version 1"),
    ('{"method": "tome", "reductions": [{"block": 1}], "version": 1}', "this is not a tokcompile plan: .*missing"),
    ('{"method": "tome", "reductions": [{"block": 1, "n": 4, "k": 2, "r": 2}], "version": 1}', "unexpected keyword"),
    ('{"method": "tome", "reductions": [], "version": 1, "colour": 1}', "unexpected keyword argument 'colour'"),
], ids=["corrupt", "list", "empty", "old", "no-version", "missing-field", "extra-field", "extra-key"])  # fmt: skip
def test_a_file_that_is_no_plan(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), plan=path)


def test_a_plan_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(PlanError, match="cannot read the plan"):
            Plan.load(path)
    with pytest.raises(PlanError, match=r"plan must be a tokcompile.Plan or the path of one, not dict"):
        optimize(tiny(), plan={})


@pytest.mark.parametrize(("reduction", "message"), [
    (Reduction(7, 12, 6), r"block 7 is not among the 3 blocks found"),
    (Reduction(0, 49, 6), r"the plan says 49 tokens come into block 0; the model has 12"),
    (Reduction(0, 12, 13), r"the plan leaves 13 tokens at block 0, where 12 come in"),
    (Reduction(0, 12, 0), r"the plan leaves 0 tokens at block 0"),
    (Reduction(0, 12, 6, place="mlp"), r"the plan's place 'mlp' is neither 'attention' nor 'block'"),
    (Reduction(0, 12, 6, prefix=4, suffix=20), r"the plan"),
    (Reduction(0, 12, 6, unit=0), r"the plan"),
    (Reduction(0, 12, 6, prefix=-1, suffix=1), r"the plan"),
], ids=["block", "n", "more", "none", "place", "suffix", "unit", "prefix"])  # fmt: skip
def test_a_plan_that_does_not_fit(reduction, message):
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), plan=Plan("random", (reduction,)))


def test_a_plan_with_blocks_out_of_order():
    plan = Plan("random", (Reduction(1, 12, 8), Reduction(0, 8, 4)))
    with pytest.raises(PlanError, match="the plan"):
        optimize(tiny(), plan=plan)


def test_a_plan_of_an_unknown_method():
    with pytest.raises(MethodError, match="unknown method 'tomee'"):
        optimize(tiny(), plan=Plan("tomee", ()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"outputs": "short"}, "outputs='short' is none of"), ({"recover": "always"}, "recover='always' is none of"),
], ids=["outputs", "recover"])  # fmt: skip
def test_a_plan_with_a_wrong_choice(changes, message):
    plan = Plan("random", (Reduction(0, 12, 6),)).replace(**changes)
    with pytest.raises(TokcompileError, match=message):
        optimize(tiny(), plan=plan)


# -- files -------------------------------------------------------------------------------------------------------------


def test_saving_where_nothing_can_be_written(optimized, tmp_path):
    with pytest.raises(ExportError, match=r"cannot write .*missing.*create the folder or choose another place"):
        optimized.save(tmp_path / "missing" / "model.pt2")
    with pytest.raises(ExportError, match="is a folder; give a file name"):
        optimized.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_breaks_off_leaves_the_old_file(optimized, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")

    def full(program, file, **rest):
        with open(file, "wb") as out:
            out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(ExportError, match=r"cannot write .*No space left on device"):
        optimized.save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def corrupt(path):
    path.write_bytes(b"not a zip")


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def truncated(path):
    model, args = tiny()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, args), buffer)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "no such file"),
    (corrupt, r"is not a torch.export archive \(.pt2\)"),
    (empty, r"is not a torch.export archive \(.pt2\)"),
    (truncated, r"is not a torch.export archive|cannot be read as a torch.export archive"),
    (foreign, "cannot be read as a torch.export archive"),
], ids=["missing", "corrupt", "empty", "truncated", "foreign"])  # fmt: skip
def test_a_file_that_is_no_program(write, message, tmp_path):
    path = tmp_path / "model.pt2"
    write(path)
    with pytest.raises(ExportError, match=message):
        tokcompile.optimize(path)
    with pytest.raises(ExportError, match=message):
        tokcompile.load(path)


def test_load_of_a_plain_program(tmp_path):
    model, args = tiny()
    torch.export.save(torch.export.export(model, args), tmp_path / "plain.pt2")
    with pytest.raises(ExportError, match=r"not one that OptimizedModel.save wrote: pass it to tokcompile.optimize instead"):
        tokcompile.load(tmp_path / "plain.pt2")


def test_load_of_another_format(tmp_path):
    model, args = tiny()
    text = json.dumps({"format": 99})
    torch.export.save(torch.export.export(model, args), tmp_path / "new.pt2", extra_files={"tokcompile.json": text})
    with pytest.raises(ExportError, match=r"has format 99; this release reads format 1"):
        tokcompile.load(tmp_path / "new.pt2")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'], ids=["corrupt", "list", "no-plan"])
def test_load_of_broken_metadata(text, tmp_path):
    model, args = tiny()
    torch.export.save(torch.export.export(model, args), tmp_path / "broken.pt2", extra_files={"tokcompile.json": text})
    with pytest.raises((ExportError, PlanError), match=r"broken.pt2"):
        tokcompile.load(tmp_path / "broken.pt2")


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


def test_check_reports_what_it_cannot_check():
    check = tokcompile.check(*tiny(swirl))
    assert check.ok
    assert "only with recover='anywhere'" in check.results[0].note
    assert "there is no rule for it" in check.results[0].note
    text = str(check)
    assert "the pass understands this model" in text
    assert json.loads(check.json())["ok"] is True
