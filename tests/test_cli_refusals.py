"""Wrong usage of the command line, and arguments that are refused: exit code 2 and one message that says why."""

import subprocess
import sys

import pytest

from tests.command_line import ROOT, TINY, refused


def test_unknown_onnx_target_is_refused(cli, tmp_path):
    result = cli("optimize", TINY, "--where", "1", "--onnx", tmp_path / "x.onnx", "--target", "toaster")
    assert refused(result, "toaster")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--save", "--save-plan", "--onnx"])
def test_files_that_cannot_be_written_are_refused_first(cli, tmp_path, option):
    assert refused(cli("optimize", "tests.command_line:broken", option, tmp_path / "missing" / "file"), "there is no folder")
    assert refused(cli("optimize", "tests.command_line:broken", option, tmp_path), "is a folder")


def test_a_folder_that_cannot_be_made_is_refused_first(cli, tmp_path):
    (tmp_path / "file").touch()
    given = ("bundle", "tests.command_line:broken", "--target", "x86", "--out")
    assert refused(cli(*given, tmp_path / "file" / "a" / "b"), "file is no folder")
    assert refused(cli(*given, tmp_path / "file"), "is there already")
    with pytest.raises(RuntimeError, match="no such luck"):  # nothing is wrong with the folder: it gets as far as the model
        cli(*given, tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "is none of\n  0.5"),
        ("98", "for 98 tokens write tokens:98"),
        ("1.5", "must be a share in (0, 1]"),
        ("0", "must be a share in (0, 1]"),
        ("nan", "must be a share in (0, 1]"),
        ("token:98", "is none of"),
        ("tokens:many", "tokens does not take 'many'"),
        ("tokens:0", "only in a language model"),
        ("tokens:50", "more than the 49 tokens"),
        ("flops:2", "must be a share in (0, 1]"),
        ("flops:0.01", "cannot be met"),
        ("keep-rate:", "keep-rate does not take ''"),
        ("remove:-1", "non-negative"),
        ("remove:3:4", "outside [-1, 1]"),
        ("schedule:3", "schedule does not take '3'"),
        ("schedule:3=a", "schedule does not take '3=a'"),
        ("schedule:9=3", "block 9"),
    ],
)
def test_bad_budgets_are_refused(cli, text, message):
    assert refused(cli("optimize", TINY, "--budget", text), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tomme"], "unknown method 'tomme'; did you mean tome"),
        (["--where", "9"], "block 9 is not among the 4 blocks"),
        (["--where", "blocks.9"], "no block has the path 'blocks.9'"),
        (["--where", "1,,2"], "is not a list of blocks"),
        (["--span", "5-30"], "is not START:STOP"),
        (["--span", "5:300"], "does not lie within the 50 tokens"),
        (["-o", "proportional"], "is not KEY=VALUE"),
        (["-o", "proportionale=true"], "did you mean proportional?"),
        (["-o", "proportional=3"], "tome's proportional takes True or False (True by default), not 3"),
        (["--method", "dart", "-o", "pivots=many"], "dart's pivots takes an int (4 by default), not 'many'"),
        (["--plan", "missing.json"], "cannot read the plan 'missing.json'"),
        (["--plan", "pyproject.toml"], "not a tokcompile plan"),
        (["--batch", "0"], "positive number"),
        (["--weights", "x.pt"], "--weights goes with timm:NAME"),
        (["--input", "1x3x32x32"], "does not run on the example inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(cli, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert refused(cli("optimize", TINY, *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["optimise", TINY], "invalid choice"),
        (["optimize"], "MODEL"),
        (["optimize", TINY, "--outputs", "short"], "invalid choice: 'short'"),
        (["optimize", TINY, "--plan", "p.json", "--method", "tome"], "--plan says all that --method"),
        (["optimize", TINY, "--target", "tensorrt"], "--target goes with --onnx"),
        (["optimize", TINY, "--inline"], "--inline goes with --onnx"),
        (["bench", TINY, "--pairs", "many"], "invalid int value"),
    ],
)
def test_wrong_usage_exits_with_2(cli, arguments, message):
    assert refused(cli(*arguments), message, "usage: tokcompile")


def test_check_refuses_paths_as_blocks(cli):
    assert refused(cli("check", TINY, "--blocks", "blocks.1"), "--blocks takes numbers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "abacus"], "runtime 'abacus' is none of eager, inductor, onnxruntime"),
        (["--method", "tomme"], "did you mean tome"),
        (["--pairs", "0"], "at least one pair"),
        (["--threads", "0"], "threads is a positive number"),
        (["-o", "pivots=3"], "none of random, tome has an option 'pivots'"),
        (["--budget", "half"], "is none of"),
    ],
)
def test_bench_refuses_what_makes_no_sense(cli, arguments, message):
    assert refused(cli("bench", TINY, *arguments), message)


def test_demo_without_its_packages_says_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokcompile.demo.run", None)
    assert refused(cli("demo"), "pip install 'tokcompile[demo]'")


def test_errors_of_the_process_are_one_message():
    command = [sys.executable, "-m", "tokcompile.cli", "optimize", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tokcompile optimize: error: 'nowhere' does not name a model")
