"""The command lines of trtexec."""

import shlex

import pytest

from tokcompile.errors import ExportError
from tokcompile.exports.targets import TARGETS
from tokcompile.exports.trtexec import DEVICES, command, get_device

JETSON = "/usr/src/tensorrt/bin/trtexec"


def test_jetson_orin():
    line = command("m.plugin.onnx", "m.engine", target="jetson-orin", plugin="lib.so")
    assert shlex.join(line) == (
        f"{JETSON} --onnx=m.plugin.onnx --stronglyTyped --dynamicPlugins=lib.so --saveEngine=m.engine --skipInference"
    )


@pytest.mark.parametrize(
    ("version", "typed"), [("10.0", True), ("10.3.0", True), ("10.16", True), ("11.0", False), ("11.4.1", False)]
)
def test_strongly_typed_is_a_flag_before_11(version, typed):
    assert ("--stronglyTyped" in command("m.onnx", "e", target="x86", tensorrt=version)) == typed


def test_everything():
    line = command(
        "my model.onnx", "e.plan", target="x86", tensorrt="11.1", plugin="a.so", embed_plugin=True, static_plugins=["b.so"],
        profiles={"x": ((1, 3), (4, 3), (8, 3)), "y:0": ((1,), (1,), (2,))}, measure=True, extra=["--noTF32"],
        trtexec="trtexec",
    )  # fmt: skip
    assert line == [
        "trtexec", "--onnx=my model.onnx", "--dynamicPlugins=a.so", "--versionCompatible", "--setPluginsToSerialize=a.so",
        "--staticPlugins=b.so", "--minShapes=x:1x3,y:0:1", "--optShapes=x:4x3,y:0:1", "--maxShapes=x:8x3,y:0:2",
        "--saveEngine=e.plan", "--noTF32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "jetson-orni"}, "did you mean jetson-orin"),
        ({"target": "x86", "tensorrt": "8.6"}, "too old"),
        ({"target": "x86", "tensorrt": "new"}, "not a version"),
        ({"target": "x86", "extra": ["--fp16"]}, "strongly typed"),
        ({"target": "x86", "extra": ["--precisionConstraints=obey"]}, "strongly typed"),
        ({"target": "x86", "embed_plugin": True}, "plugin library"),
        ({"target": "x86", "profiles": {"a,b": ((1,), (1,), (1,))}}, "rename it"),
        ({"target": "x86", "profiles": {"a": ((1, 2), (1,), (1,))}}, "smallest, best, largest"),
        ({"target": "x86", "profiles": {"a": ((2,), (1,), (3,))}}, "smallest, best, largest"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ExportError, match=message):
        command("m.onnx", "m.engine", **options)


def test_devices():
    assert {d.name: (d.tensorrt, d.preset) for d in DEVICES.values()} == {
        "jetson-orin": ("10.3", "jetpack6"), "jetson-thor": ("10.13", "jetpack7"), "x86": ("10.7", "x86"),
    }  # fmt: skip
    assert get_device("jetpack6") is get_device("jetson_orin") is DEVICES["jetson-orin"]
    assert get_device("tensorrt") is DEVICES["x86"]
    assert DEVICES["jetson-orin"].sm == (87,)
    assert 110 in DEVICES["jetson-thor"].sm
    assert DEVICES["jetson-orin"].include == "/usr/include/aarch64-linux-gnu"
    assert all(device.target in TARGETS for device in DEVICES.values())
