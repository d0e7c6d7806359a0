"""Plans and files that are corrupt, foreign, old or do not fit, and files that cannot be written."""

import io
import json
import re
import zipfile

import pytest
import torch

import tokcompile
from tests.tiny import optimize, tiny
from tokcompile import Plan, Reduction
from tokcompile.errors import (
    ExportError,
    MethodError,
    PlanError,
    TokcompileError,
)


@pytest.fixture
def optimized():
    return optimize(tiny())


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
    ('{"method": "tome", "reductions": [{"block": 1, "n": 4, "k": "2"}], "version": 1}', "the 'k' of a reduction is '2'"),
    ('{"method": "tome", "reductions": [], "version": 1, "options": []}', r"the 'options' of a plan are \[\]"),
], ids=["corrupt", "list", "empty", "old", "no-version", "missing", "extra-field", "extra-key", "text", "list-in"])  # fmt: skip
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
    (Reduction(0, 12, 0), r"the plan at block 0: all tokens can be dropped only in a language model"),
    (Reduction(0, 12, 6, place="mlp"), r"the plan's place 'mlp' is neither 'attention' nor 'block'"),
    (Reduction(0, 12, 6, prefix=4, suffix=20), r"the plan"),
    (Reduction(0, 12, 6, unit=0), r"the plan"),
    (Reduction(0, 12, 6, prefix=-1, suffix=1), r"the plan"),
    (Reduction(0, 12, 5, method="tome"), r"the plan leaves 5 of 12 tokens at block 0, and 'tome' leaves at least 6 of them"),
    (Reduction(0, 12, 6, options={"seed": 1}), r"block 0 has options and no method"),
], ids=["block", "n", "more", "none", "place", "suffix", "unit", "prefix", "least", "options"])  # fmt: skip
def test_a_plan_that_does_not_fit(reduction, message):
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), plan=Plan("random", (reduction,)))


@pytest.mark.parametrize(("first", "second", "message"), [
    (Reduction(1, 12, 8), Reduction(0, 8, 4), "not in the order of their blocks"),
    (Reduction(1, 12, 8), Reduction(1, 8, 4, place="block"), "not in the order of their blocks"),
    (Reduction(1, 12, 8), Reduction(1, 12, 8), "reduces the same tokens twice at one place"),
], ids=["blocks", "entrance", "twice"])  # fmt: skip
def test_a_plan_with_blocks_out_of_order(first, second, message):
    with pytest.raises(PlanError, match=message):
        optimize(tiny(), plan=Plan("random", (first, second)))


def test_a_plan_that_counts_blocks_from_the_end():
    made = optimize(tiny(), plan=Plan("random", (Reduction(0, 12, 8), Reduction(-1, 8, 4)))).plan
    assert [(r.block, r.n, r.k) for r in made.reductions] == [(0, 12, 8), (2, 8, 4)]


def test_a_plan_of_an_unknown_method():
    with pytest.raises(MethodError, match="unknown method 'tomee'"):
        tokcompile.optimize(*tiny(), plan=Plan("tomee", ()))


def test_what_is_asked_beside_a_plan_is_not_ignored():
    plan = Plan("random", (Reduction(0, 12, 6),))
    for other in (dict(method="grid"), dict(budget=0.3), dict(where=[1]), dict(outputs="reduced"), dict(recover="never")):
        with pytest.raises(PlanError, match=rf"a plan was passed, which says {next(iter(other))} itself: leave them out"):
            optimize(tiny(), plan=plan, **other)


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


def newer(path):
    """Of a version that this torch does not know."""
    model, args = tiny()
    torch.export.save(torch.export.export(model, args), path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, re.sub(rb'"schema_version": {"major": \d+', b'"schema_version": {"major": 999', data))


def truncated(path):
    model, args = tiny()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, args), buffer)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def damaged(path):
    """One weight is another number, which torch alone does not notice."""
    model, args = tiny()
    torch.export.save(torch.export.export(model, args), path)
    content, weight = path.read_bytes(), model.blocks[0].mlp.weight.detach().numpy().tobytes()
    assert weight in content
    path.write_bytes(content.replace(weight, bytes(4) + weight[4:]))


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "no such file"),
    (corrupt, r"is not a torch.export archive \(.pt2\)"),
    (empty, r"is not a torch.export archive \(.pt2\)"),
    (truncated, r"is not a torch.export archive|cannot be read as a torch.export archive"),
    (foreign, "cannot be read as a torch.export archive: torch.export.save did not write it"),
    (newer, r"cannot be read as a torch.export archive: SerializeError: .*major=999.* does not match our current schema"),
    (damaged, r"is damaged: .*weights.* does not have its checksum"),
], ids=["missing", "corrupt", "empty", "truncated", "foreign", "newer", "damaged"])  # fmt: skip
def test_a_file_that_is_no_program(write, message, tmp_path, logged):
    path = tmp_path / "model.pt2"
    write(path)
    with pytest.raises(ExportError, match=message):
        tokcompile.optimize(path)
    with pytest.raises(ExportError, match=message):
        tokcompile.load(path)
    assert logged == []


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
