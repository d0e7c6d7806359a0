"""What a bundle holds, and that nothing half-written is left where one could not be made."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tokcompile
from tests.command_line import TINY
from tests.exports.bundles import SCRIPTS, TARGETS, copy_of, export_again, files_of, made, run, small, vit
from tests.exports.models import tiny
from tokcompile.cli import main
from tokcompile.errors import ExportError
from tokcompile.exports import bundle as bundles
from tokcompile.exports.bundle_files.common import sha256
from tokcompile.exports.trtexec import DEVICES

PLUGINS = bundles.PLUGINS


@pytest.fixture
def quick(monkeypatch):
    """Exports each model once only."""
    monkeypatch.setattr("tokcompile.exports.onnx.export_onnx", export_again)


@pytest.mark.parametrize("target", TARGETS)
def test_manifest_names_every_file(target):
    folder, device = made(target), DEVICES[target]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == files_of(folder) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert (entry["bytes"], entry["sha256"]) == ((folder / name).stat().st_size, sha256(folder / name))
    assert manifest["tokcompile"] == tokcompile.__version__
    assert tokcompile.Plan.from_json(json.dumps(manifest["plan"])) == vit().plan
    assert manifest["target"]["tensorrt"] == device.tensorrt
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["method"] == "tome"


@pytest.mark.parametrize("target", TARGETS)
def test_models_with_and_without_plugin(target):
    folder = made(target)
    plain, plugin = (onnx.load(folder / f"model.{form}.onnx") for form in ("plain", "plugin"))
    assert [node.op_type for node in plugin.graph.node if node.domain == "tokcompile"] == ["Tome", "Tome"]
    assert not plugin.functions
    assert {node.domain for node in plain.graph.node} == {""}


@pytest.mark.parametrize("target", TARGETS)
def test_preset_and_plugin_sources_are_there(target):
    folder = made(target)
    settings = (folder / "settings.sh").read_text()
    preset = re.search(r"^preset=(\S+)$", settings, re.M)[1]
    assert preset == DEVICES[target].preset
    presets = json.loads((folder / "plugins" / "CMakePresets.json").read_text())
    assert preset in {p["name"] for p in presets["configurePresets"]}
    sources = {name for name in files_of(PLUGINS) if name.startswith(("kernels/", "tensorrt/"))}
    assert sources | {"CMakeLists.txt", "CMakePresets.json"} == files_of(folder / "plugins")


@pytest.mark.parametrize("target", TARGETS)
def test_archive_unpacks_to_the_same(target, tmp_path):
    folder = made(target)
    with tarfile.open(f"{folder}.tar.gz") as tar:
        assert {m.uname for m in tar.getmembers()} == {""}
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / folder.name
    assert files_of(unpacked) == files_of(folder)
    for name in files_of(folder):
        assert (unpacked / name).read_bytes() == (folder / name).read_bytes()
    assert all((unpacked / name).stat().st_mode & 0o111 for name in SCRIPTS)
    assert (unpacked / "triton" / "model_repository" / "vit" / "1").is_dir()


def test_goldens_are_what_torch_gives():
    folder = made("x86")
    goldens = json.loads((folder / "manifest.json").read_text())["goldens"]
    assert len(goldens) == 2
    for golden in goldens:
        inputs = [torch.from_numpy(np.load(folder / name)) for name in golden["inputs"]]
        with torch.no_grad():
            want = vit()(*inputs)
        assert np.array_equal(np.load(folder / golden["outputs"][0]), want.numpy())
    assert not np.array_equal(*(np.load(folder / g["inputs"][0]) for g in goldens))


def test_readme_is_filled_in_and_names_what_exists():
    for target in TARGETS:
        folder = made(target)
        text = (folder / "README.md").read_text()
        assert "$name" not in text
        assert DEVICES[target].title in text
        assert all(len(line) <= 130 or line.startswith(("|", " ")) for line in text.splitlines())
        for name in re.findall(r"^\| `([^`]+)` \|", text[text.index("## Files") :], re.M):
            assert all((folder / part).exists() for part in name.split(", "))
        for script, flags in re.findall(r"\./(build\.sh|run\.py|verify\.py)((?: --[\w-]+)+)", text):
            source = (folder / script).read_text()
            assert all(flag in source for flag in flags.split() if flag != "--")


def test_triton_config_has_the_inputs_and_outputs_of_the_onnx_file():
    folder = made("x86")
    text = (folder / "triton" / "model_repository" / "vit" / "config.pbtxt").read_text()
    graph = onnx.load(folder / "model.plain.onnx").graph
    for value in (*graph.input, *graph.output):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        assert f'{{ name: "{value.name}" data_type: TYPE_FP32 dims: {dims} }}' in text
    assert text.count("{ name:") == len(graph.input) + len(graph.output)
    assert "max_batch_size: 0" in text
    assert 'platform: "tensorrt_plan"' in text


def test_method_without_plugin(quick, tmp_path):
    report = small("random").bundle(tmp_path / "out", target="jetson-orin")
    assert report.models == {"plain": "model.plain.onnx"}
    assert "random has no plugin" in str(report)
    assert not (tmp_path / "out" / "plugins").exists()
    assert "has no plugin" in (tmp_path / "out" / "README.md").read_text()
    assert run(tmp_path / "out", "verify.py", "--backend", "onnxruntime").returncode == 0
    with pytest.raises(ExportError, match="random has no plugin"):
        small("random").bundle(tmp_path / "other", target="jetson-orin", form="plugin")
    assert not (tmp_path / "other").exists()


@pytest.mark.every(2)
@pytest.mark.parametrize(("form", "other"), [("plugin", "plain"), ("plain", "plugin")])
def test_one_form_only(form, other, quick, tmp_path):
    small("tome").bundle(tmp_path / "out", target="jetson-orin", form=form, archive=False, name="a b")
    assert (tmp_path / "out" / f"model.{form}.onnx").exists()
    assert not (tmp_path / "out" / f"model.{other}.onnx").exists()
    assert not (tmp_path / "out.tar.gz").exists()
    assert (tmp_path / "out" / "triton" / "model_repository" / "a_b" / "1").is_dir()
    found = run(tmp_path / "out", "verify.py", "--backend", "onnxruntime")
    assert (found.returncode, "no model.plain.onnx" in found.stderr) == ((2, True) if form == "plugin" else (0, False))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float32), (None, torch.float16)])
def test_half_precision(precision, dtype, tmp_path):
    tiny(dtype, method="topk").bundle(tmp_path / "out", target="x86", precision=precision)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["precision"] == (precision or "float16")
    assert manifest["tolerance"] == {"onnxruntime": 2e-2, "tensorrt": 3e-2}
    assert manifest["inputs"][0]["dtype"] == str(dtype).removeprefix("torch.")
    found = run(tmp_path / "out", "verify.py", "--backend", "onnxruntime")
    assert found.returncode == 0, found.stdout + found.stderr


def test_bfloat16_goldens_are_kept_as_bits(tmp_path):
    opt = tiny(torch.bfloat16, method="topk")
    opt.bundle(tmp_path / "out", target="jetson-thor")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["outputs"][0]["dtype"] == "bfloat16"
    bits = torch.from_numpy(np.load(tmp_path / "out" / manifest["goldens"][0]["outputs"][0])).view(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(bits, opt(*opt.example_inputs))
    found = run(tmp_path / "out", "verify.py", "--backend", "onnxruntime")
    assert found.returncode == 2
    assert "bfloat16" in found.stderr


def elf(machine: int) -> bytes:
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + bytes(44)


def test_plugin_library_goes_along_if_it_is_for_the_target(quick, tmp_path):
    library = tmp_path / "built.so"
    library.write_bytes(elf(183))
    small("tome").bundle(tmp_path / "out", target="jetson-orin", plugin_library=library)
    assert (tmp_path / "out" / "bin" / "libtokcompile_plugins.so").read_bytes() == elf(183)
    for content, message in ((elf(62), "another machine"), (b"text", "not a shared library"), (None, "cannot be read")):
        library.unlink()
        if content:
            library.write_bytes(content)
        with pytest.raises(ExportError, match=message):
            small("tome").bundle(tmp_path / "new", target="jetson-orin", plugin_library=library)
    assert sorted(p.name for p in tmp_path.iterdir() if p != library) == ["out", "out.tar.gz"]


def test_names_that_are_taken(quick, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there already"):
        vit().bundle(tmp_path / "out", target="x86")
    (tmp_path / "free.tar.gz").touch()
    with pytest.raises(ExportError, match=r"free\.tar\.gz is there already"):
        vit().bundle(tmp_path / "free", target="x86")
    assert sorted(files_of(tmp_path)) == ["free.tar.gz", "out/mine.txt"]
    small("tome").bundle(tmp_path / "out", target="x86", overwrite=True, archive=False)
    assert "out/mine.txt" not in files_of(tmp_path)
    assert run(tmp_path / "out", "verify.py", "--dry-run").returncode == 0
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is there already"):
        vit().bundle(tmp_path / "file", target="x86", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "jetson-orion"}, "did you mean jetson-orin"),
        ({"target": "toaster"}, "there are jetson-orin, jetson-thor, x86"),
        ({"target": "x86", "form": "functions"}, "form='functions' is none of"),
        ({"target": "x86", "precision": "fp12"}, "fp12"),
    ],
)
def test_wrong_options_leave_nothing(options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        vit().bundle(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_folders_on_the_way_are_created(tmp_path):
    report = vit().bundle(tmp_path / "a" / "b" / "out", target="x86", form="plain")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["out", "out.tar.gz"]
    assert len(files_of(tmp_path / "a" / "b" / "out")) == report.files


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ExportError, match="fp12"):
        vit().bundle(tmp_path / "missing" / "out", target="x86", precision="fp12")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        vit().bundle(tmp_path / "file" / "out", target="x86")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["write_manifest", "pack", "copy_files"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_writing_leaves_what_was_there(what, error, quick, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(bundles, what, fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ExportError):
        small("random").bundle(tmp_path / "out", target="x86", overwrite=True)
    assert files_of(tmp_path) == {"out/old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_command_line(tmp_path, capsys):
    arguments = [TINY, "--where", "1", "--form", "plugin", "--target", "jetson-orin"]
    out = tmp_path / "out"
    assert main(["bundle", *arguments, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["archive"] == f"{out}.tar.gz"
    assert report["reductions"] == {"Tome": 1}
    assert main(["bundle", *arguments, "--out", str(out)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(["bundle", *arguments[:-1], "jetson-thorr", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean jetson-thor" in capsys.readouterr().err


def test_other_packages_are_not_needed_to_read_a_bundle(tmp_path):
    """The scripts start in a Python that has neither numpy nor any of us."""
    folder = copy_of("jetson-orin", tmp_path)
    for script in ("run.py", "verify.py"):
        done = subprocess.run([sys.executable, "-E", "-S", folder / script, "--dry-run"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "would run" in done.stdout
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def test_package_data_holds_the_files_of_a_bundle():
    """What is copied into bundles must also be in a wheel."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not run from the repository")
    text = (root / "pyproject.toml").read_text()
    data = text[text.index("[tool.setuptools.package-data]") :].split("\n[", 1)[0]
    patterns = {name: re.findall(r'"([^"]+)"', row) for name, row in re.findall(r'"(tokcompile\.\w+)" = \[([^\]]*)\]', data)}
    wanted = {name for name in files_of(bundles.FILES) if "__pycache__" not in name}
    found = {
        p.relative_to(bundles.FILES.parent).as_posix()
        for g in patterns["tokcompile.exports"]
        for p in root.glob(f"exports/{g}")
    }
    assert {f"bundle_files/{name}" for name in wanted} <= found
    sources = {p.relative_to(PLUGINS).as_posix() for g in patterns["tokcompile.plugins"] for p in PLUGINS.glob(g)}
    assert files_of(made("x86") / "plugins") <= sources
