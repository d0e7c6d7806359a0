"""Building the plugin library: where headers come from, and what is said where something is missing."""

import json
import os
import shutil
import subprocess

import pytest

from tokcompile.errors import ExportError
from tokcompile.plugins import build


@pytest.fixture
def headers(tmp_path):
    """A folder that looks like TensorRT's headers."""
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / build.HEADER).write_text("#define NV_TENSORRT_MAJOR 8\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(build, "SYSTEM", ())


def test_an_unknown_preset(tmp_path):
    with pytest.raises(ExportError, match="unknown preset 'arm'; there are x86, jetpack6, jetpack7, host"):
        build.build("arm", tmp_path)


def test_presets_are_those_of_cmake():
    presets = json.loads((build.SOURCES / "CMakePresets.json").read_text())
    assert [p["name"] for p in presets["configurePresets"] if not p.get("hidden")] == list(build.PRESETS)
    assert [p["name"] for p in presets["buildPresets"]] == list(build.PRESETS)


def test_given_headers_come_first(headers, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert build.find_headers(headers, tmp_path) == headers


def test_headers_of_the_environment(headers, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(headers))
    assert build.find_headers(None, tmp_path) == headers


def test_installed_headers(headers, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SYSTEM", (str(tmp_path / "none"), str(tmp_path / "inc*")))
    assert build.find_headers(None, tmp_path) == headers


def test_a_folder_without_headers(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"tensorrt_include='.*' holds no NvInferRuntime.h: give the folder of"):
        build.find_headers(tmp_path, tmp_path)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(ExportError, match=r"TENSORRT_INCLUDE_DIR='.*' holds no NvInferRuntime.h"):
        build.find_headers(None, tmp_path)


def test_no_headers_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExportError, match=r"kernel-lens==2.0.1, which ships them, cannot be downloaded \(.*\): set TENSORRT"):
        build.find_headers(None, tmp_path / "build")


def test_a_wheel_that_is_not_the_locked_one(tmp_path, monkeypatch):
    (tmp_path / "kernel_lens-2.0.1-py3-none-any.whl").write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExportError, match="cannot be downloaded"):
        build.download_headers(tmp_path / "build")


def test_no_cmake(headers, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match=r"needs cmake 3.22 or later: pip install cmake"):
        build.build("host", tmp_path, headers)


def test_a_folder_that_cannot_be_written(headers, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot build the plugin library in .*file"):
        build.build("host", tmp_path / "file", headers)


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="no cmake or no C++ compiler")
def test_a_failed_build_says_why(headers, tmp_path):
    with pytest.raises(ExportError, match=r"(?s)all of it stands in .*build.log:.*tokcompile needs TensorRT 10 or later"):
        build.build("host", tmp_path / "build", headers)
    assert "--preset host" in (tmp_path / "build" / "build.log").read_text()


def test_only_one_build_at_a_time(headers, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(build, "run", lambda command, folder: held.append(lock_is_held(folder)))
    assert build.build("host", tmp_path, headers) == tmp_path / build.LIBRARY
    assert held == [True, True]
    assert not lock_is_held(tmp_path)


def lock_is_held(folder):
    """Whether another process would have to wait."""
    return subprocess.run(["flock", "-n", folder / ".lock", "true"]).returncode != 0


def test_options_of_cmake(headers, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(build, "run", lambda command, folder: commands.append(command))
    build.build("jetpack7", tmp_path, headers, architectures=[87, 110])
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real;110-real" in commands[0]
    assert f"-DTENSORRT_INCLUDE_DIR={headers}" in commands[0]
    assert commands[0][1:5] == ["--preset", "jetpack7", "-B", str(tmp_path)]


def test_the_command(headers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "run", lambda command, folder: None)
    assert build.main(["--preset", "host", "--build-dir", str(tmp_path), "--tensorrt-include", str(headers)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / build.LIBRARY}\n"
    assert build.main(["--build-dir", str(tmp_path), "--tensorrt-include", os.devnull]) == 1
    assert "holds no NvInferRuntime.h" in capsys.readouterr().err


def test_the_lock_names_every_release_once():
    lock = build.lock()
    rows = lock["compiled"]
    assert len({row["sha256"] for row in rows}) == len(rows)
    assert {row["tensorrt"].rsplit(".", 1)[0] for row in rows} >= {"10.0", "10.3", "10.7", "10.13", "11.0", "11.1"}
    assert all(len(value) == 64 for value in (lock["wheel"]["sha256"], lock["wheel"]["file_sha256"]))
