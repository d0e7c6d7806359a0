"""Where image features are written into a prompt is found from the example inputs."""

import pytest
import torch

from tests.passes.graphs import Function
from tokcompile.errors import InputError
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.placeholders import UnequalRows, find_placeholders, guard_positions
from tokcompile.passes.trace import flat_caller, trace

TABLE = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
IMAGE = 9


def prompt(*rows):
    """Token ids: text 1, image tokens where a row says so."""
    return torch.tensor([[IMAGE if c == "i" else 1 for c in row] for row in rows])


def features(count):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def scattered(ids, image):
    mask = (ids == IMAGE).unsqueeze(-1)
    embeds = torch.nn.functional.embedding(ids, TABLE)
    return embeds.masked_scatter(mask.expand_as(embeds), image * 2)


def indexed(ids, image):
    embeds = torch.nn.functional.embedding(ids, TABLE)
    embeds[ids == IMAGE] = image * 2
    return embeds


def found(fn, *inputs):
    traced = trace(Function(fn).eval(), inputs)
    return find_placeholders(canonicalise(traced.gm, traced.inputs), traced.inputs)


@pytest.mark.parametrize("fn", [scattered, indexed], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("rows", "spans"), [
    (["ttiiit"], [(2, 5)]),
    (["iiitit"], [(0, 3), (4, 5)]),
    (["tiiiti", "tiiiti", "tiiiti"], [(1, 4), (5, 6)]),
    (["iiii"], [(0, 4)]),
], ids=["one", "two", "batch", "all"])  # fmt: skip
def test_runs_of_image_tokens(fn, rows, spans):
    ids = prompt(*rows)
    (one,) = found(fn, ids, features(int((ids == IMAGE).sum())))
    assert one.spans == spans
    assert one.rows == (tuple(spans),) * len(rows)
    assert torch.equal(one.mask, ids == IMAGE)
    assert "scatter" in one.node.name or "index_put" in one.node.name


@pytest.mark.parametrize("fn", [scattered, indexed], ids=lambda f: f.__name__)
def test_unequal_rows_are_an_error(fn):
    (one,) = found(fn, prompt("tiit", "tiii"), features(5))
    assert one.rows == (((1, 3),), ((1, 4),))
    with pytest.raises(UnequalRows, match="sample 0 has its image tokens at 1-2, sample 1 at 1-3") as error:
        _ = one.spans
    assert "what to do: arrange the prompts of a batch alike" in str(error.value)


def test_a_prompt_without_image_tokens_has_no_runs():
    (one,) = found(lambda ids, image: scattered(ids, image), prompt("tttt"), features(2))
    assert one.spans == []


def test_writes_of_something_else_are_not_placeholders():
    def fn(ids, image):
        x = torch.nn.functional.embedding(ids, TABLE) * image.sum()
        mask = (ids == IMAGE).unsqueeze(-1)
        constant = x.masked_scatter(mask.expand_as(x), TABLE)  # does not depend on the inputs
        channels = x.masked_scatter(torch.arange(8) < 4, image)  # some channels of every token
        return constant, channels, (x @ x.mT).flatten(1).masked_scatter(x.flatten(1)[:, :16] > 0, image)

    assert found(fn, prompt("tiit"), features(4)) == []


def test_positions_come_from_this_program_not_from_another():
    """The mask is evaluated, whatever ops it is made of."""

    def fn(ids, image):
        embeds = torch.nn.functional.embedding(ids, TABLE)
        first = torch.cumsum(ids == IMAGE, 1) <= 2
        return embeds.masked_scatter(((ids == IMAGE) & first).unsqueeze(-1), image)

    (one,) = found(fn, prompt("tiiiti"), features(2))
    assert one.spans == [(1, 3)]


@pytest.mark.parametrize("fn", [scattered, indexed], ids=lambda f: f.__name__)
def test_other_positions_are_refused_once_they_are_fixed(fn):
    ids, image = prompt("tiitit", "tiitit"), features(6)
    traced = trace(Function(fn).eval(), (ids, image))
    graph = canonicalise(traced.gm, traced.inputs)
    guards = guard_positions(graph, find_placeholders(graph, traced.inputs), traced.inputs)
    assert guards.lines == ["image tokens are at 1-2, 4-4 from inputs_0"]
    flat_caller(traced)(prompt("titiit", "tiitit"), image)  # the traced program itself still takes them
    traced.checks.append(guards)
    call = flat_caller(traced)
    assert torch.equal(call(ids * 1, image + 1)[1], image + 1)
    with pytest.raises(InputError, match="these inputs differ from the example inputs in what was fixed while tracing"):
        call(prompt("titiit", "tiitit"), image)


def test_positions_that_differ_between_samples_are_described():
    ids, image = prompt("tiit", "tiii"), features(5)
    traced = trace(Function(scattered).eval(), (ids, image))
    guards = guard_positions(traced.gm, find_placeholders(traced.gm, traced.inputs), traced.inputs)
    assert guards.lines == ["image tokens are at 1-2 in sample 0; 1-3 in sample 1 from inputs_0"]
