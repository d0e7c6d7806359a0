"""Finding and building the library of the PyTorch ops, without a GPU and with a compiler that is none."""

import logging
import subprocess
import sys

import pytest
import torch

from tests.plugins.test_torch_ops import never
from tokcompile.plugins import torch_library, torch_ops


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been asked or built yet."""
    torch_ops.library.cache_clear()
    torch_ops.note.cache_clear()
    monkeypatch.setenv("TOKCOMPILE_CACHE", str(tmp_path))
    for name in ("TOKCOMPILE_KERNELS", "TOKCOMPILE_HOST_KERNELS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    torch_ops.library.cache_clear()


def test_the_cpu_uses_the_reference_unless_a_library_is_named(fresh, monkeypatch, caplog):
    assert torch_ops.library("cpu") is None
    assert torch_ops.library("meta") is None
    torch_ops.library.cache_clear()
    monkeypatch.setenv("TOKCOMPILE_HOST_KERNELS", str(fresh / "missing.so"))
    with caplog.at_level(logging.WARNING, "tokcompile"):
        assert torch_ops.library("cpu") is None
    assert "missing.so" in caplog.text


def test_a_gpu_without_nvcc_uses_the_reference_and_says_so(fresh, monkeypatch, caplog):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch_library.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING, "tokcompile"):
        assert torch_ops.library("cuda") is None
        assert torch_ops.library("cuda") is None
    assert caplog.text.count("nvcc was not found") == 1


def test_kernels_can_be_switched_off(fresh, monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setenv("TOKCOMPILE_KERNELS", "off")
    monkeypatch.setattr(torch_library, "build", never)
    assert torch_ops.library("cuda") is None


def pretend_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def fake_nvcc(monkeypatch, folder, body):
    tool = folder / "nvcc"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(tool))


def test_a_build_is_kept_under_what_it_was_built_from(fresh, monkeypatch):
    count = fresh / "count"
    write = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'
    fake_nvcc(monkeypatch, fresh, f'echo "$@" >> {count}\n{write}')
    path = torch_library.build([90, 80, 90])
    assert path.read_text() == "built\n"
    assert torch_library.build([80, 90]) == path
    assert torch_library.build([80]) != path
    calls = count.read_text().splitlines()
    assert len(calls) == 2
    assert "arch=compute_80,code=sm_80" in calls[0]
    assert "arch=compute_90,code=compute_90" in calls[0]
    assert sorted(p.suffix for p in fresh.glob("lib*")) == [".so", ".so"]


def test_a_failed_build_shows_the_compiler_and_leaves_nothing(fresh, monkeypatch, capsys):
    fake_nvcc(monkeypatch, fresh, "echo 'launch.cu(1): error: no' >&2; exit 2")
    with pytest.raises(torch_library.BuildError, match=r"launch\.cu\(1\): error: no"):
        torch_library.build([90])
    assert torch_library.main(["--arch", "90"]) == 1
    assert "error: no" in capsys.readouterr().err
    assert not list(fresh.glob("*.so"))


def test_building_without_a_gpu_asks_for_which(fresh):
    with pytest.raises(torch_library.BuildError, match="--arch"):
        torch_library.build()


def test_the_structure_is_the_one_of_the_header():
    header = (torch_library.SOURCES / "launch.h").read_text()
    text = header[header.index("typedef struct") : header.index("} tc_shape")]
    fields = [
        name.strip()
        for line in text.splitlines()
        if (code := line.partition("//")[0].strip()).startswith("int32_t")
        for name in code.removeprefix("int32_t").rstrip(";").split(",")
    ]
    assert fields == [name for name, _ in torch_ops.Shape._fields_]


def test_the_library_is_built_by_a_command_of_its_own():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tokcompile.plugins.torch_library", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--arch" in done.stdout
