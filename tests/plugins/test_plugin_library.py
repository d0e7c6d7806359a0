"""The TensorRT plugin library without TensorRT: its creators and nodes on the CPU, what it exports, and that it compiles."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_equal, error
from tests.methods.inputs import sequence
from tokcompile.errors import ExportError
from tokcompile.passes.reduction import ReductionModule
from tokcompile.plugins import build
from tokcompile.plugins.contract import OUTPUTS, PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS, op_type, reduction_node
from tokcompile.plugins.torch_library import find_nvcc
from tokcompile.recipe import Site, get_method

METHODS = ("dart", "topk", "fastv", "fastervlm", "fopru", "pyramiddrop", "evit", "tome", "pitome", "divprune")
CODES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
TYPES = {0: torch.float32, 1: torch.float16, 7: torch.bfloat16, 8: torch.int64}  # nvinfer1::DataType
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two roundings: of the kernel, of the reference
ENTRIES = {"getCreators", "setLoggerFinder"}
SHIMS = sorted(build.SOURCES.glob("tensorrt/*.cpp"))
STRICT = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror")


def headers(folder):
    """TensorRT's headers; skips with the reason where there are none."""
    try:
        return build.find_headers(None, Path(folder).absolute())
    except ExportError as why:
        pytest.skip(f"no TensorRT headers: {why}")


def built(folder, **options):
    """The library; skips with the reason where something that the build needs is not there."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("the plugin library needs cmake and a C++ compiler")
    return build.build(build_dir=folder, tensorrt_include=headers(folder), **options)


@pytest.fixture(scope="session")
def host():
    """The library over the kernels' host build, and beside it the programs of plugins/host_test."""
    return built("build/tests/plugins-host", preset="host", sanitize="address")


@pytest.fixture(scope="session")
def cuda():
    """The library that `make plugins` builds, for all its architectures."""
    if not find_nvcc():
        pytest.skip("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    return built("build/plugins", preset="x86")


# -- creators and nodes ------------------------------------------------------------------------------------------------


def test_creators(host):
    done = subprocess.run([host.parent / "creator_round_trip"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 failed\n", "")


def reduction(method, n, k, *, prefix=1, suffix=0, unit=1, start=None, tap_start=None, block=2, assign=True, **options):
    recipe = get_method(method)
    site = Site(n, k, prefix, suffix, block=block, depth=12, options=recipe.with_options(options))
    module = ReductionModule(recipe, site, unit, recipe.taps_read(), start, tap_start)
    module.needs_assign = assign
    return module


def run_node(host, folder, module, tensors, dtype):
    """The outputs of a plugin made from the attributes that the exporter writes for this module."""
    outputs = ["x", "index", *(["size"] if module.recipe.track_size else []), *(["assign"] if module.needs_assign else [])]
    node = reduction_node(module, tuple(outputs))
    lines = [f"plugin {node.op_type}", f"dtype {CODES[dtype]}"]
    for name, value in node.attributes.items():
        kind = {str: "text", float: "float"}.get(type(value), "int")
        lines.append(" ".join([kind, name, *map(str, value if isinstance(value, tuple) else (value,))]))
    for name in node.inputs:
        (folder / name).write_bytes(bytes(tensors[name].contiguous().view(torch.uint8).flatten().tolist()))
        lines.append(" ".join(["input", name, *map(str, tensors[name].shape)]))
    (folder / "node").write_text("\n".join(lines) + "\n")
    done = subprocess.run([host.parent / "creator_node", folder], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = {}
    for i, (name, line) in enumerate(zip(outputs, done.stdout.splitlines(), strict=True)):
        code, *shape = map(int, line.split())
        found[name] = torch.frombuffer(bytearray((folder / f"output_{i}").read_bytes()), dtype=TYPES[code]).view(shape)
    return found


def inputs(module, length, dtype, tap_length=None, batch=2):
    taps = sequence(batch, tap_length or length, dtype=dtype, d=16)
    taps["rotated_k"] = taps["k"]
    taps["x"] = sequence(batch, length, dtype=dtype, d=16)["x"]
    taps["size"] = taps["size"][:, : module.site.n].float()
    return taps


def compare(host, folder, module, length, dtype=torch.float32, tap_length=None):
    tensors = inputs(module, length, dtype, tap_length)
    size = tensors["size"] if module.recipe.track_size else None
    want = dict(zip(OUTPUTS, module.reference(tensors["x"], size, *(tensors[name] for name in module.names))))
    got = run_node(host, folder, module, tensors, dtype)
    for name, value in got.items():
        assert value.dtype == want[name].dtype
        assert value.shape == want[name].shape
        if name in ("index", "assign"):
            assert_equal(value, want[name])
        else:
            assert error(value.float(), want[name].float()) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", CODES, ids=CODES.values())
@pytest.mark.parametrize("method", METHODS)
def test_a_node_reduces_as_its_recipe_does(host, tmp_path, method, dtype):
    compare(host, tmp_path, reduction(method, 24, 17, prefix=1, suffix=2), 27, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_keeps_all(host, tmp_path, method):
    compare(host, tmp_path, reduction(method, 9, 9), 10)


@pytest.mark.parametrize("method", METHODS)
def test_groups(host, tmp_path, method):
    compare(host, tmp_path, reduction(method, 12, 8, prefix=1, unit=4, assign=False), 52)


@pytest.mark.parametrize("method", METHODS)
def test_taps_longer_than_x(host, tmp_path, method):
    compare(host, tmp_path, reduction(method, 12, 8, prefix=7, start=3, tap_start=7), 20, tap_length=24)


@pytest.mark.parametrize(("method", "options"), [
    ("dart", {"pivots": 1}), ("dart", {"pivots": 60}), ("evit", {"fuse": False}), ("pitome", {"variant": "B"}),
    ("pitome", {"variant": "P"}), ("pitome", {"variant": "mae", "margin": 0.3, "alpha": 2}), ("tome", {"proportional": False}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("block", [2, 9])
def test_options(host, tmp_path, method, options, block):
    compare(host, tmp_path, reduction(method, 24, 17, block=block, **options), 25)


def test_tome_without_a_class_token(host, tmp_path):
    compare(host, tmp_path, reduction("tome", 24, 17, prefix=0), 24)


@pytest.mark.parametrize("dtype", CODES, ids=CODES.values())
@pytest.mark.parametrize(("text", "text_pivots"), [
    (((0, 1), (25, 31)), 4), (((26, 28), (29, 31)), 9), (((0, 1),), 4), (((25, 31),), 0),
], ids=str)  # fmt: skip
def test_pivots_from_text(host, tmp_path, text, text_pivots, dtype):
    """As the exporter writes them inside a language model: one node with all of the text."""
    module = reduction("dart", 24, 17, text_pivots=text_pivots)
    module.site = replace(module.site, start=1, text=text)
    compare(host, tmp_path, module, 31, dtype)


def test_names_are_those_of_the_contract():
    sources = "".join(path.read_text() for path in build.SOURCES.glob("tensorrt/*.*"))
    assert f'NAMESPACE = "{PLUGIN_NAMESPACE}"' in sources
    assert f'VERSION = "{PLUGIN_VERSION}"' in sources
    held = re.findall(r'^      \{"(\w+)", \{', sources, re.MULTILINE)
    assert held == [op_type(m) for m in METHODS]
    assert set(held) == PLUGINS


# -- the library -----------------------------------------------------------------------------------------------------------


def check_symbols(library):
    """Only the entry points and the launchers are visible, and no TensorRT or CUDA library is needed."""
    lines = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in lines.splitlines()}
    declared = set(re.findall(r"TC_API \w+ (tc_\w+)\(", (build.SOURCES / "kernels" / "launch.h").read_text()))
    assert names - {"tc_host_threads"} == ENTRIES | declared
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert re.search("NEEDED.*libstdc", needed)
    assert not re.search("NEEDED.*(nvinfer|tensorrt|cuda|nvonnx)", needed)


def test_symbols_of_the_host_build(host):
    check_symbols(host)


@pytest.mark.matrix  # six architectures; test_jetsons compiles the same sources for two
@pytest.mark.slow
def test_symbols(cuda):
    check_symbols(cuda)


@pytest.mark.slow
def test_jetsons():
    if not find_nvcc():
        pytest.skip("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    library = built("build/tests/plugins-jetpack7", preset="jetpack7")
    check_symbols(library)
    assert targets(library) == (["110", "87"], [])


@pytest.mark.matrix
@pytest.mark.slow
def test_architectures(cuda):
    assert targets(cuda) == (["100", "120", "80", "86", "89", "90"], ["120"])


def targets(library):
    """What the kernels were compiled for: (machine code, PTX)."""
    commands = json.loads((library.parent / "compile_commands.json").read_text())
    kernels = " ".join(c["command"] for c in commands if c["file"].endswith(".cu"))
    return sorted(set(re.findall(r"\bsm_(\d+)", kernels))), sorted(set(re.findall(r"code=\[?compute_(\d+)", kernels)))


# -- the headers -----------------------------------------------------------------------------------------------------------


def compile_shims(include):
    """The compiler's complaints about the shims with these headers."""
    cuda = build.SOURCES / "host_test" / "cuda"
    command = ["c++", *STRICT, "-isystem", str(include), "-isystem", str(cuda), *map(str, SHIMS)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_shims_compile_against_the_locked_headers(tmp_path):
    try:
        include = build.download_headers(tmp_path)
    except ExportError as why:
        pytest.skip(f"no TensorRT headers: {why}")
    assert build.digest(include) == build.lock()["wheel"]["sha256"]
    assert compile_shims(include) == ""


def test_shims_compile_against_other_headers():
    folders = [f for f in os.environ.get("TOKCOMPILE_TENSORRT_HEADERS", "").split(os.pathsep) if f]
    if not folders:
        pytest.skip("TOKCOMPILE_TENSORRT_HEADERS names no folders of other TensorRT releases' headers")
    assert {folder: compile_shims(folder) for folder in folders} == dict.fromkeys(folders, "")


def test_older_headers_are_refused(tmp_path):
    (tmp_path / "NvInferRuntime.h").write_text("#define NV_TENSORRT_MAJOR 8\n")
    assert "tokcompile needs TensorRT 10 or later" in compile_shims(tmp_path)
