"""Targets are data: what each one takes, which files it gets, and what is refused for it."""

import os

import onnx
import pytest
import torch

import tokcompile
from tests.exports.models import attributes, reductions, run, same, tiny
from tests.tiny import WIDTH, Tiny
from tokcompile.errors import ExportError
from tokcompile.exports.targets import TARGETS, get_target


@pytest.fixture(scope="module")
def opt():
    """Two reductions whose bodies differ in their ops."""
    return tiny(method="tome", budget=tokcompile.Schedule({0: 40, 1: 20}))


def test_names_are_found_with_either_dash():
    assert get_target("tensorrt-11") is get_target("tensorrt_11")
    with pytest.raises(ExportError, match="unknown target 'jetpack5'; did you mean jetpack"):
        get_target("jetpack5")


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.tensorrt])
def test_every_tensorrt_forbids_what_it_does_not_take(name):
    target = TARGETS[name]
    assert {"NonZero", "ScatterND:add", "ScatterElements:max"} <= target.forbidden
    assert target.top_k == 3840
    assert target.opset <= target.newest_opset


@pytest.fixture(scope="module")
def jetpack6(opt, tmp_path_factory):
    """(folder, report)"""
    folder = tmp_path_factory.mktemp("jetpack6")
    return folder, opt.export_onnx(folder / "m.onnx", target="jetpack6")


def test_jetpack6_gets_a_file_with_plugins_and_one_without(opt, jetpack6):
    folder, report = jetpack6
    assert sorted(os.listdir(folder)) == ["m.plain.onnx", "m.plugin.onnx"]
    assert report.files == {form: str(folder / f"m.{form}.onnx") for form in ("plain", "plugin")}
    assert report.bytes == sum(os.path.getsize(path) for path in report.files.values())
    assert 0 < report.error <= 1e-4
    plain = onnx.load(report.files["plain"])
    assert {node.domain for node in plain.graph.node} == {""}
    with torch.no_grad():
        want = [opt(*opt.example_inputs)]
    assert same(run(report.files["plain"], dict(zip(report.inputs, opt.example_inputs, strict=True))), want)


def test_a_plugin_file_has_one_node_a_reduction_and_no_functions(opt, jetpack6):
    report = jetpack6[1]
    written = onnx.load(report.files["plugin"])
    assert not written.functions
    assert report.nodes == {"Tome": 2}
    first, second = reductions(written)
    assert (first.op_type, second.op_type) == ("Tome", "Tome")  # the second body was Tome_2
    for node, reduction in zip((first, second), opt.plan.reductions, strict=True):
        given = attributes(node)
        assert (given["plugin_namespace"], given["plugin_version"]) == ("tokcompile", "1")
        assert (given["n"], given["k"]) == (reduction.n, reduction.k)
        assert not [name for name in given if name[0] == "c" and name[1:].isdigit()]
    assert [r["shape"][1] for r in report.reductions] == [40, 20]


@pytest.mark.parametrize("method", ["grid", pytest.param("random", marks=pytest.mark.matrix)])
def test_methods_without_a_kernel_are_plain_in_every_form(method, tmp_path):
    report = tiny(method=method).export_onnx(tmp_path / "m.onnx", target="tensorrt", form="plugin")
    assert report.nodes == {}
    assert not any(r["fused"] for r in report.reductions)
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} == {""}


def test_a_method_of_the_same_name_is_not_taken_for_ours(tmp_path):
    from tokcompile.methods.topk import TOPK

    other = tokcompile.Recipe("dart", lambda tokens, site: tokcompile.Keep(keep_first(tokens, site)), steps=TOPK.steps)
    report = tiny(method=other, where=[0]).export_onnx(tmp_path / "m.onnx", target="tensorrt", form="plugin", verify=False)
    assert report.nodes == {}


def keep_first(tokens, site):
    return torch.arange(site.k).expand(tokens.x.shape[0], -1)


def test_a_name_may_say_which_of_two_files_is_wanted(tmp_path):
    report = tiny(method="topk", where=[1]).export_onnx(tmp_path / "m.plugin.onnx", target="jetpack6", verify=False)
    assert os.listdir(tmp_path) == ["m.plugin.onnx"]
    assert report.form == "plugin"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "plugin"}, "onnxruntime has no such plugin"),
        ({"form": "fused"}, "form='fused' is none of functions, plain, plugin, both"),
        ({"form": "functions", "inline": True}, "inline=True is form='plain'"),
        ({"target": "jetpack6", "opset": 22}, r"opset=22 is newer than what jetpack6 \(TensorRT 10.3\) reads"),
        ({"dynamic_batch": True}, "needs form='plain' or form='plugin'"),
        ({"dynamic_batch": True, "form": "plain"}, "share a batch of 2 or more"),
    ],
)
def test_refused_options(opt, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        opt.export_onnx(tmp_path / "m.onnx", **options)
    assert os.listdir(tmp_path) == []


def test_more_tokens_than_topk_takes_need_the_plugin(tmp_path):
    """Sorting 3,900 kept indices is a TopK with K = 3,900."""
    model, x = Tiny().eval(), torch.randn(1, 4000, WIDTH)
    opt = tokcompile.optimize(model, (x,), method="dart", budget=tokcompile.Tokens(3900))
    options = {"target": "jetpack6", "verify": False}
    with pytest.raises(ExportError, match=r"node 'reduction_0' selects the top 3900 tokens.*3840\n.*form='plugin'"):
        opt.export_onnx(tmp_path / "m.onnx", form="plain", **options)
    assert os.listdir(tmp_path) == []
    report = opt.export_onnx(tmp_path / "m.onnx", form="plugin", **options)
    assert report.nodes == {"Dart": 1}
