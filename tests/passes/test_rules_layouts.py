"""Rules where tokens lie on other axes or in groups, and what the registry and a call show to a rule."""

import pytest
import torch
import torch.nn.functional as F

from tests.passes.graphs import canonical, fixed, reduced, rewriter, run, subset
from tests.passes.test_rules import KEPT, extra
from tokcompile.passes.rules import RULES, Call, NeedsFull, register_rule
from tokcompile.passes.rules.core import rank_of
from tokcompile.passes.tokens import Batch, Seq, Space, describe


def test_tokens_on_the_first_axis():
    x = extra("B L 16", 11, 3, 1)  # (L, B, D)
    index = subset(3, 11, KEPT, sort=False)
    table = extra("L 16", 1, 11, 2)
    out = reduced(lambda x, t: F.gelu(x + t[:, None]), (x, table), index, 11, axis=0, batch_axis=1)
    assert describe(out.output_labels[0]) == "[Seq(s0:11->6), B3, 16]"
    got = run(out.gm, x, table)[0]
    for b in range(3):
        torch.testing.assert_close(got[:, b], F.gelu(x[index[b], b] + table[index[b]]), rtol=0, atol=1e-12)


def test_tokens_without_a_batch():
    x, table = extra("L 16", 1, 11, 1), extra("L 16", 1, 11, 2)
    index = subset(1, 11, KEPT, sort=False)
    out = reduced(lambda x, t: (x + t).view(11, 2, 8).transpose(0, 1), (x, table), index, 11, axis=0, batch_axis=None)
    assert describe(out.output_labels[0]) == "[2, Seq(s0:11->6), 8]"
    want = (x + table)[index[0]].view(KEPT, 2, 8).transpose(0, 1)
    torch.testing.assert_close(run(out.gm, x, table)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
def test_groups_stay_together(batch):
    """Units of 4 rows: a merger that joins 4 neighbours still finds its groups; tables are gathered by whole groups."""
    x, table = extra("B L 16", batch, 20, 1), extra("L 16", 1, 20, 2)
    index = subset(batch, 5, 3)
    fn = lambda x, t: (x + t).reshape(x.shape[0], -1, 64)  # noqa: E731
    out = reduced(fn, (x, table), index, 5, unit=4)
    assert describe(out.output_labels[0]) == f"[{f'B{batch}' if batch > 1 else 1}, Seq(s0:5->3), 64]"
    got = run(out.gm, x, table)[0]
    for b in range(batch):
        torch.testing.assert_close(got[b : b + 1], fn(x, table)[b : b + 1, index[b]], rtol=0, atol=1e-12)


def test_rules_are_registered_by_packet(monkeypatch):
    monkeypatch.setattr("tokcompile.passes.rules.core.RULES", rules := {})
    rule = lambda call: call.emit(call.label("self"))  # noqa: E731
    assert register_rule("lib::op", rule) is rule
    assert register_rule("lib.other", rule) is rule
    assert set(rules) == {"lib.op", "lib.other"}
    assert all(name.startswith(("aten.", "quantized_decomposed.")) for name in RULES)


def test_a_call_shows_arguments_by_name_with_defaults():
    x = extra("B L 16", 2, 11, 1)
    gm = canonical(lambda x: x.softmax(1), x)
    rw = rewriter(gm, fixed(subset(2, 11, 6)), 11, 6)
    seen = []
    rules = {**RULES, "aten.softmax": lambda call: seen.append(call) or RULES["aten.softmax"](call)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokcompile.passes.rewrite.RULES", rules)
        rw.run()
    (call,) = seen
    assert isinstance(call, Call)
    assert (call["dim"], call["dtype"], call.old_shape) == (1, None, (2, 11, 16))
    assert call.tensors() == ["self"]
    assert call.labelled("self")
    assert describe(call.label("self")) == "[B2, Seq(s0:11->6), 16]"


def test_a_rule_may_ask_for_all_tokens():
    def rule(call):
        raise NeedsFull("it is shy")

    x = extra("B L 16", 2, 11, 1)
    rw = rewriter(canonical(lambda x: x.relu(), x), fixed(subset(2, 11, 11, sort=False)), 11, 11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokcompile.passes.rewrite.RULES", {**RULES, "aten.relu": rule})
        out = rw.run()
    assert [r.reason for r in out.recoveries] == ["it is shy"]
    assert torch.equal(run(out.gm, x)[0], x.relu())


def test_the_most_refined_axis_wins():
    first = Space("a", 10, 6)
    second = Space("b", 6, 3, first)
    plain, batch = (10,), (Batch(10),)
    once, twice = (Seq((first,)),), (Seq((second,)),)
    order = [(), plain, batch, once, twice]
    for weak, strong in zip(order, order[1:]):
        assert rank_of(strong) > rank_of(weak)
    assert rank_of(twice) > rank_of(once) > rank_of(plain)
