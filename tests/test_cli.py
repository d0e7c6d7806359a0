"""The command line: what it prints, the files it writes, its exit codes, and what signals and unexpected errors make of it."""

import io
import json
import signal
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import tokcompile
from tests.command_line import ROOT, TINY, tiny
from tokcompile import Flops, KeepRate, Remove, Schedule, Share, Tokens
from tokcompile.cli import commands, main, show, values
from tokcompile.files import atomic
from tokcompile.recipe import methods as known_methods


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(1, 3, 8, 8),)


def noisy():
    print("this model talks")
    return tiny()


def interrupted():
    raise KeyboardInterrupt


def terminated():
    with atomic("half.onnx"):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)


def test_optimize_prints_plan_and_report(cli):
    code, out, err = cli("optimize", TINY, "--method", "topk", "--budget", "tokens:20", "--where", "1")
    assert (code, err) == (0, "")
    assert out.startswith("topk, 1 reduction\n  block   1 attention    49 -> 20    blocks.1\n")
    assert "FLOPs" in out


def test_optimize_json_is_the_plan_and_the_report(cli):
    code, out, err = cli("optimize", TINY, "--json", "--budget", "0.5", "-o", "proportional=false")
    assert (code, err) == (0, "")
    data = json.loads(out)
    model, args = tiny()
    expected = tokcompile.optimize(model.eval(), args, method="tome", budget=0.5, proportional=False)
    assert tokcompile.Plan.from_json(json.dumps(data["plan"])) == expected.plan
    assert data["report"]["flops_ratio"] == expected.report.flops_ratio < 1
    assert (data["model"], data["files"]) == (TINY, {})


def test_saved_files_make_the_same_model_again(cli, tmp_path):
    saved, plan = tmp_path / "tiny.pt2", tmp_path / "plan.json"
    code, out, _ = cli("optimize", TINY, "--method", "evit", "--save", saved, "--save-plan", plan)
    assert code == 0
    assert f"model: {saved}" in out
    assert f"plan: {plan}" in out
    model, args = tiny()
    expected = tokcompile.optimize(model.eval(), args, method="evit")
    assert tokcompile.Plan.load(plan) == expected.plan
    torch.testing.assert_close(tokcompile.load(saved)(*args), expected(*args))
    code, out, _ = cli("optimize", saved, "--plan", plan, "--json")
    assert code == 0
    assert tokcompile.Plan.from_json(json.dumps(json.loads(out)["plan"])) == expected.plan


def test_onnx_file_is_written_and_reported(cli, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'tokcompile[onnx]'")
    path = tmp_path / "tiny.onnx"
    code, out, _ = cli("optimize", TINY, "--where", "1", "--onnx", path, "--target", "onnxruntime", "--inline", "--json")
    assert code == 0
    report = json.loads(out)["files"]["onnx"]
    assert (report["path"], report["form"], report["target"]) == (str(path), "plain", "onnxruntime")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Share(0.5)),
        ("1", Share(1.0)),
        ("share:0.25", Share(0.25)),
        ("tokens:98", Tokens(98)),
        ("flops:0.7", Flops(0.7)),
        ("keep-rate:0.7", KeepRate(0.7)),
        ("remove:16", Remove(16)),
        ("remove:16:-0.5", Remove(16, -0.5)),
        ("schedule:3=98,6=60", Schedule({3: 98, 6: 60})),
    ],
)
def test_every_form_of_budget_is_read(text, budget):
    assert values.budget(text) == budget


@pytest.mark.parametrize("command", ["optimize", "inspect", "check", "bench", "demo"])
def test_help_has_examples(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"examples:\n  tokcompile {command}" in out


def test_version(cli):
    assert cli("--version")[:2] == (0, f"tokcompile {tokcompile.__version__}\n")


def test_inspect_shows_blocks_and_tokens(cli):
    code, out, _ = cli("inspect", TINY, "--batch", "2")
    assert code == 0
    assert "image 2x3x28x28 float32" in out
    assert "    3      50       1      49       0  7x7   blocks.3  yes" in out
    assert "reducible at 4 blocks; by default methods choose among 0-3" in out


def test_inspect_json(cli):
    data = json.loads(cli("inspect", TINY, "--json")[1])
    assert [b["path"] for b in data["blocks"]] == [f"blocks.{i}" for i in range(4)]
    assert [b["grid"] for b in data["blocks"]] == [[7, 7]] * 4
    assert (data["sites"], data["visual"], data["refused"]) == ([0, 1, 2, 3], [0, 1, 2, 3], [])
    assert data["flops"] > 0


def test_inspect_says_that_nothing_was_found(cli):
    code, out, _ = cli("inspect", "tests.test_cli:convolution")
    assert code == 0
    assert "no residual attention block was found" in out


def test_check_passes(cli):
    code, out, _ = cli("check", TINY, "--blocks", "0,2")
    assert code == 0
    assert out.count(" ok\n") == 6
    assert "the pass understands this model" in out


def test_check_that_fails_exits_with_1(cli):
    code, out, _ = cli("check", "tests.test_cli:convolution", "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_methods_lists_all(cli):
    code, out, _ = cli("methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(known_methods())
    data = json.loads(cli("methods", "--json")[1])
    assert list(data) == list(known_methods())
    assert data["tome"]["options"] == {"proportional": True}
    assert data["evit"]["blocks_of_12"] == [3, 6, 9]


def test_bench_times_random_and_the_methods(cli):
    code, out, err = cli("bench", TINY, "--pairs", "2", "--method", "tome,topk", "--budget", "tokens:30")
    assert code == 0
    lines = out.splitlines()
    assert "threads 1" in lines[0]
    assert lines[1].startswith("A/A eager: ")
    methods = [line.split()[1] for line in lines[3:]]
    assert methods == ["random", "tome", "topk"]
    assert "compiling tome at Tokens(k=30)" in err


def test_bench_json_and_a_budget_that_does_not_fit(cli):
    code, out, err = cli("bench", TINY, "--pairs", "1", "--where", "1", "--budget", "0.1", "--json")
    assert code == 2
    data = json.loads(out)
    assert [r["method"] for r in data["rows"]] == ["random"]
    assert len(data["errors"]) == 1
    assert data["errors"][0].startswith("tome at 0.1: block 1: 'tome' cannot go from 49 to 5 tokens")
    assert data["errors"][0] in err


def test_demo_is_handed_its_arguments(cli, monkeypatch):
    seen = []
    fake = types.ModuleType("tokcompile.demo.run")
    fake.main = lambda args: seen.append(args) or print("a table") or {"models": []}
    monkeypatch.setitem(sys.modules, "tokcompile.demo.run", fake)
    assert cli("demo", "--out", "there", "--image", "cat.jpg", "--quick")[:2] == (0, "a table\n")
    assert (seen[0].out, seen[0].image, seen[0].quick) == ("there", "cat.jpg", True)
    code, out, err = cli("demo", "--json")
    assert (code, json.loads(out), err) == (0, {"models": []}, "a table\n")


def test_unexpected_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="no such luck"):
        main(["inspect", "tests.command_line:broken"])


@pytest.mark.parametrize(("code", "how"), [(130, "interrupted"), (143, "terminated")])
def test_a_signal_is_no_traceback_and_leaves_no_files(cli, tmp_path, monkeypatch, code, how):
    monkeypatch.chdir(tmp_path)
    assert cli("inspect", f"tests.test_cli:{how}") == (code, "", f"tokcompile inspect: {how}\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_model_prints_stays_out_of_the_json():
    command = [sys.executable, "-m", "tokcompile.cli", "inspect", "tests.test_cli:noisy", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["blocks"]) == 4
    assert "this model talks" in done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_tables_use_rich_on_a_terminal_and_columns_without_it(monkeypatch):
    table = show.Table(("name", "size"), [("a[b]", "1"), ("c", "22")], right=("size",))
    plain = "name  size\na[b]     1\nc       22"
    assert str(table) == plain
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show.emit(show.Result(parts=[table]), False)
    assert terminal.getvalue() == plain + "\n"
    monkeypatch.delitem(sys.modules, "rich.console")
    pytest.importorskip("rich", reason="rich is not installed: pip install rich")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    show.emit(show.Result(parts=[table]), False)
    assert "a[b]" in terminal.getvalue()
    assert terminal.getvalue() != plain + "\n"


def test_block_numbers_are_shown_as_ranges():
    assert commands.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert commands.ranges([]) == "none of them"
