"""The documentation runs: Python blocks in order, shown output, commands, links and doctests."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tokcompile
from tokcompile import recipe
from tokcompile.cli.arguments import parse
from tokcompile.passes.rules import RULES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = (
    "tokcompile", "tokcompile.api", "tokcompile.backend", "tokcompile.oracles",
    "tokcompile.passes.plan", "tokcompile.passes.rules.core", "tokcompile.recipe", "tokcompile.timing",
)  # fmt: skip
NOT_RUN, OUTPUT = "<!-- not run -->", "<!-- output -->"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
WAYS_OUT = ("exported_program", "export_onnx", "build_engine", "bundle", "save")
ONNX = ("onnx", "onnxscript", "onnxruntime")  # what export_onnx imports when it is called
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


class Fenced(NamedTuple):
    """A fenced block; line: of its first line in the page; mark: the line before it that is not empty."""

    kind: str
    code: str
    line: int
    mark: str


def fenced(page: Path) -> list[Fenced]:
    text = page.read_text(encoding="utf-8")
    before = [(m, text[: m.start()]) for m in FENCE.finditer(text)]
    return [
        Fenced(m.group(1), m.group(2), head.count("\n") + 2, (head.rstrip().splitlines() or [""])[-1]) for m, head in before
    ]


def missing(code: str) -> list[str]:
    """The packages a block needs that are not installed."""
    names = {n.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for n in node.names}
    names |= {n.module for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and n.module}
    wanted = {name.partition(".")[0] for name in names} | {name for name in ONNX if "export_onnx" in code}
    return sorted(name for name in wanted if importlib.util.find_spec(name) is None)


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """An empty folder to write to; methods and rules that a page registers are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "_REGISTRY", dict(recipe._REGISTRY))
    rules = dict(RULES)
    yield
    RULES.clear()
    RULES.update(rules)
    torch._dynamo.reset()


@by_page
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_and_print_what_is_shown(page, clean, monkeypatch):
    blocks = fenced(page)
    runnable = [b for b in blocks if b.kind == "python" and b.mark != NOT_RUN]
    assert all(b.kind == "text" for b in blocks if b.mark == OUTPUT)
    namespace = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))
    printed = ""
    for block in blocks:
        if block in runnable:
            if lacking := missing(block.code):
                pytest.skip(f"the block at line {block.line} and those after it need {', '.join(lacking)}")
            code = compile("\n" * (block.line - 1) + block.code, str(page.relative_to(ROOT)), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif block.mark == OUTPUT:
            same = doctest.OutputChecker().check_output(block.code, printed, FLAGS)
            assert same, f"{page.name}:{block.line} shows\n{block.code}\nbut this is printed:\n{printed}"


@by_page
def test_commands_parse(page):
    lines = [line for b in fenced(page) if b.kind == "sh" for line in b.code.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tokcompile ")]
    parsed = [parse(command).command for command in commands]
    assert parsed == [command[0] for command in commands]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles}


@by_page
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_reference_names_all_that_is_public():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not [name for name in (*tokcompile.__all__, *WAYS_OUT) if f"`{name}" not in reference]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_doctests(name, clean):
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    torch._dynamo.reset()
    assert result.failed == 0
    assert result.attempted > 0 or name == "tokcompile"
