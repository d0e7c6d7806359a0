"""The kernels under sanitizers, which find no race and no wrong access, and under nvcc, which takes them without a warning."""

import os
import shutil
import subprocess

import pytest

from tests.plugins.kernels import SOURCES, compiled


def run(program, **variables):
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, env={**os.environ, **variables})
    text = done.stdout + done.stderr
    if "unexpected memory mapping" in text:
        pytest.skip("this kernel's address space randomisation (vm.mmap_rnd_bits) is more than ThreadSanitizer takes")
    return done.returncode, text


@pytest.mark.every(2)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer):
    flags = ("-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    code, text = run(compiled(f"all-{sanitizer}", ["host.cpp", "run_all.cpp"], *flags))
    assert (code, text.strip()) == (0, "fine")


def test_a_missing_barrier_is_found():
    """The same kernel with and without barriers, so that the silence of the test above means something."""
    flags = ("-O0", "-g1", "-fsanitize=thread")
    whole = compiled("race", ["race.cpp"], *flags)
    broken = compiled("race-broken", ["race.cpp"], *flags, "-DTC_BREAK_BARRIER")
    assert run(whole)[0] == 0
    code, text = run(broken, TSAN_OPTIONS="halt_on_error=1")
    assert code != 0
    assert "data race" in text


ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)


@pytest.mark.matrix
@pytest.mark.slow
def test_nvcc_takes_the_kernels(tmp_path):
    """For one architecture, without warnings and without spilled registers; `ARCHITECTURES` are built for a release."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-Xcompiler", "-Wall", "-Werror", "all-warnings"]
    source = SOURCES / "kernels" / "launch.cu"
    done = subprocess.run([nvcc, *flags, str(source), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line and "0 bytes spill stores" not in line]
    assert not spills
