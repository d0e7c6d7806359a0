"""One thread, fixed seeds, models and exported programs that are built once, and the collected support table."""

import functools
import gc
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch._export import utils as export_utils
from torch.export import ExportedProgram
from torch.fx import proxy
from torch.onnx._internal.exporter import _schemas
from torch.onnx._internal.exporter._registration import onnxscript_apis
from torch.utils import _pytree as pytree

from tests import command_line
from tests.models import FAMILIES, shake
from tests.shared import Stack, analysed, compared, remembered, shared
from tokcompile import api
from tokcompile.passes import trace

torch.set_num_threads(1)
TOLD = {"evs": {"frames": 7}}  # what a method has to be told about 49 patches: here each row of them is a frame
BOTH_MASKS = pytest.mark.skipif(torch.__version__ >= (2, 14), reason="torch takes no mask beside is_causal any more")
TABLES = (  # of torch's ops, which each export to ONNX makes anew
    (onnxscript_apis, "get_torchlib_ops"), (_schemas, "op_signature_from_function"),
    (export_utils, "_materialize_cpp_cia_ops"),
)  # fmt: skip
SUPPORT = Path(__file__).parent.parent / "build" / "support.json"


class Built(NamedTuple):
    """A shaken family model with its example inputs; shared between tests, so never changed."""

    model: torch.nn.Module
    args: tuple
    kwargs: dict

    def __call__(self) -> list[torch.Tensor]:
        """The tensors the original gives, in the order in which they are returned."""
        return leaves(run(self.model, *self.args, **self.kwargs))


def run(function, *args, **kwargs) -> Any:
    """A call without autograd and without nn.TransformerEncoderLayer's fused kernel, which rounds differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return function(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def counts(model) -> list[tuple[int, int, int]]:
    """(block, tokens before, tokens after) of each reduction."""
    return [(r.block, r.n, r.k) for r in model.plan.reductions]


def assert_equal(got: Any, want: Any) -> None:
    """The same tensors, bit for bit."""
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def layer(model: Any, number: int) -> int:
    """The block that is this layer of the language model behind a tower."""
    return [b["index"] for b in model.report.blocks if "language_model" in b["path"]][number]


def error(got: Any, want: Any) -> float:
    """The largest difference relative to the largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(leaves(got), leaves(want)))


@functools.cache
def build(name: str, batch: int = 1) -> Built:
    model, args, kwargs = FAMILIES[name].build(batch)
    return Built(shared(shake(model)), args, kwargs)


@functools.cache
def traced(name: str, batch: int = 1) -> tuple[ExportedProgram, list[str]]:
    """The exported program, and the values that had to be fixed to export it."""
    return trace.export(*build(name, batch))


def export(name: str, batch: int = 1) -> ExportedProgram:
    return traced(name, batch)[0]


@pytest.fixture(autouse=True, scope="session")
def traces():
    """One trace of each shared model and example, one analysis of each of their programs, one table of ops in ONNX.

    What was imported stays: it is not gone through for garbage again and again, and graphs, of many small objects, are not
    after every 700 new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "CapturedTraceback", Stack)
        patch.setattr(trace, "export", remembered(trace.export))
        patch.setattr(trace, "check_faithful", compared(trace.check_faithful))
        patch.setattr(api, "analyse", analysed(api.analyse))
        for place, name in TABLES:
            patch.setattr(place, name, functools.cache(getattr(place, name)))
        yield


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def logged(monkeypatch):
    """The warnings and errors that any library logs during the test."""
    records = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda self, r: r.levelno < logging.WARNING or records.append(r.msg))
    return records


@pytest.fixture
def cli(capsys):
    """cli(*arguments): the exit code, stdout and stderr of one command."""
    return functools.partial(command_line.run, capsys)


@pytest.fixture(scope="session")
def family():
    """family(name, batch): a shaken model with inputs."""
    return build


@pytest.fixture(scope="session")
def program():
    """program(name, batch): the same as an ExportedProgram, which costs no second trace."""
    return export


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `every(n)`, the cases 0, n, 2n, ... always run, and the others with -m matrix."""
    cases: dict[str, int] = {}
    for item in items:
        test = item.nodeid.split("[")[0]
        cases[test] = case = cases.get(test, -1) + 1
        if (mark := item.get_closest_marker("every")) and case % mark.args[0]:
            item.add_marker("matrix")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from tests.schedule import ByFamily

    return ByFamily(config, log) if config.getvalue("dist") == "load" else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what test_families.py found out to build/support.json, from which tools/support_table.py makes a table."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None:
        return
    rows = [
        value
        for reports in reporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "support" and report.when == "call"
    ]
    if not rows:
        return
    known = json.loads(SUPPORT.read_text()) if SUPPORT.exists() else {}
    for row in rows:
        known.setdefault(row["family"], {}).update({str(row["batch"]): row})
    SUPPORT.parent.mkdir(exist_ok=True)
    SUPPORT.write_text(json.dumps({name: known[name] for name in FAMILIES if name in known}, indent=1))
