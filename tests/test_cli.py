"""The command line: what it prints, the files it writes, its exit codes, and its answers to wrong usage."""

import functools
import io
import json
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import tokcompile
from tests.models.family import seeded
from tests.shared import shared
from tokcompile import Flops, KeepRate, Remove, Schedule, Share, Tokens
from tokcompile.cli import commands, main, show, values
from tokcompile.files import atomic
from tokcompile.recipe import methods as known_methods

ROOT = Path(__file__).parent.parent
TINY = "tests.test_cli:tiny"


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A class token and 7 x 7 patches."""

    def __init__(self, width=16, heads=2, depth=4):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 50, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@functools.cache
def small(batch):
    with seeded():
        return shared(Vit()), (torch.randn(batch, 3, 28, 28),)


def tiny(batch=1):
    model, args = small(batch)
    return model.train(), args  # as models are before anybody calls eval()


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(1, 3, 8, 8),)


def noisy():
    print("this model talks")
    return tiny()


def broken():
    raise RuntimeError("no such luck")


def interrupted():
    raise KeyboardInterrupt


def terminated():
    with atomic("half.onnx"):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def cli(capsys):
    return partial(run, capsys)


def refused(result, *parts):
    """Exit code 2, one message with all the parts, nothing on stdout and no traceback."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    return True


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


def test_unknown_onnx_target_is_refused(cli, tmp_path):
    result = cli("optimize", TINY, "--where", "1", "--onnx", tmp_path / "x.onnx", "--target", "toaster")
    assert refused(result, "toaster")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--save", "--save-plan", "--onnx"])
def test_files_that_cannot_be_written_are_refused_first(cli, tmp_path, option):
    assert refused(cli("optimize", "tests.test_cli:broken", option, tmp_path / "missing" / "file"), "there is no folder")
    assert refused(cli("optimize", "tests.test_cli:broken", option, tmp_path), "is a folder")


def test_a_folder_that_cannot_be_made_is_refused_first(cli, tmp_path):
    (tmp_path / "file").touch()
    given = ("bundle", "tests.test_cli:broken", "--target", "x86", "--out")
    assert refused(cli(*given, tmp_path / "file" / "a" / "b"), "file is no folder")
    assert refused(cli(*given, tmp_path / "file"), "is there already")
    with pytest.raises(RuntimeError, match="no such luck"):  # nothing is wrong with the folder: it gets as far as the model
        cli(*given, tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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


def test_check_refuses_paths_as_blocks(cli):
    assert refused(cli("check", TINY, "--blocks", "blocks.1"), "--blocks takes numbers")


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


def test_demo_is_handed_its_arguments(cli, monkeypatch):
    seen = []
    fake = types.ModuleType("tokcompile.demo.run")
    fake.main = lambda args: seen.append(args) or print("a table") or {"models": []}
    monkeypatch.setitem(sys.modules, "tokcompile.demo.run", fake)
    assert cli("demo", "--out", "there", "--image", "cat.jpg", "--quick")[:2] == (0, "a table\n")
    assert (seen[0].out, seen[0].image, seen[0].quick) == ("there", "cat.jpg", True)
    code, out, err = cli("demo", "--json")
    assert (code, json.loads(out), err) == (0, {"models": []}, "a table\n")


def test_demo_without_its_packages_says_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokcompile.demo.run", None)
    assert refused(cli("demo"), "pip install 'tokcompile[demo]'")


def test_unexpected_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="no such luck"):
        main(["inspect", "tests.test_cli:broken"])


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


def test_errors_of_the_process_are_one_message():
    command = [sys.executable, "-m", "tokcompile.cli", "optimize", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tokcompile optimize: error: 'nowhere' does not name a model")


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
