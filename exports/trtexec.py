"""Engines by `trtexec`: the exact command lines for each device and TensorRT version."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokcompile.errors import ExportError
from tokcompile.exports.targets import TARGETS

PLUGIN_LIBRARY = "libtokcompile_plugins.so"

# a strongly typed network has its types in the graph: trtexec 10 refuses these beside --stronglyTyped, 11 lacks them
WEAK = frozenset({"--fp16", "--bf16", "--int8", "--fp8", "--int4", "--fp4", "--best", "--calib", "--precisionConstraints"})

Profile = Sequence[Sequence[int]]  # smallest, best and largest shape of one input


@dataclass(frozen=True)
class Device:
    """A kind of machine that engines are built on.

    preset: of plugins/CMakePresets.json. target: of `export_onnx`, with the oldest TensorRT that its files are for.
    machine: what `uname -m` says there, and `elf` the same in the header of a library.
    """

    name: str
    title: str
    preset: str
    target: str
    cuda: str
    machine: str
    elf: int
    trtexec: str = "/usr/src/tensorrt/bin/trtexec"

    @property
    def tensorrt(self) -> str:
        return TARGETS[self.target].tensorrt

    @property
    def sm(self) -> tuple[int, ...]:
        return TARGETS[self.target].sm

    @property
    def include(self) -> str:
        """Where the TensorRT headers lie when they came as Debian packages."""
        return f"/usr/include/{self.machine}-linux-gnu"


AARCH64, X86 = ("aarch64", 183), ("x86_64", 62)
DEVICES = {
    d.name: d
    for d in (
        Device("jetson-orin", "Jetson Orin with JetPack 6", "jetpack6", "jetpack6", "12.6", *AARCH64),
        Device("jetson-thor", "Jetson Thor with JetPack 7", "jetpack7", "jetpack7", "13.0", *AARCH64),
        Device("x86", "x86-64 with an NVIDIA GPU", "x86", "tensorrt", "12.8 or later", *X86),
    )
}


def get_device(name: str) -> Device:
    """The device of that name, preset or export target. Raises: ExportError with the nearest name."""
    wanted = str(name).replace("_", "-")
    for device in DEVICES.values():
        if wanted in (device.name, device.preset, device.target):
            return device
    near = difflib.get_close_matches(wanted, DEVICES, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DEVICES)}"
    raise ExportError(f"unknown target {name!r}; {hint}")


def command(
    onnx: str | os.PathLike[str],
    engine: str | os.PathLike[str],
    *,
    target: str,
    tensorrt: str | None = None,
    plugin: str | os.PathLike[str] | None = None,
    embed_plugin: bool = False,
    static_plugins: Sequence[str | os.PathLike[str]] = (),
    profiles: Mapping[str, Profile] | None = None,
    measure: bool = False,
    extra: Sequence[str] = (),
    trtexec: str | os.PathLike[str] | None = None,
) -> list[str]:
    """The line that builds an engine, as a list for subprocess; `shlex.join` makes text of it.

    target: a name in `DEVICES`. tensorrt: the version there, the target's oldest by default. plugin: our library, which
    registers itself through `getCreators` and so must be loaded dynamically. embed_plugin: writes it into the engine too,
    which makes it a version-compatible one. static_plugins: libraries that register themselves while they are loaded.
    profiles: shapes of inputs with free dimensions. measure: whether trtexec also times the engine.

    Raises: ExportError for flags and names that trtexec does not take.
    """
    device = get_device(target)
    version = parse_version(tensorrt or device.tensorrt)
    args = [os.fspath(trtexec or device.trtexec), f"--onnx={os.fspath(onnx)}"]
    if version < (11, 0):
        args.append("--stronglyTyped")  # the only kind of network from 11 on
    if plugin is not None:
        args.append(f"--dynamicPlugins={os.fspath(plugin)}")
    if embed_plugin:
        if plugin is None:
            raise ExportError("embed_plugin=True needs the plugin library: pass plugin=...")
        args += ["--versionCompatible", f"--setPluginsToSerialize={os.fspath(plugin)}"]
    args += [f"--staticPlugins={os.fspath(path)}" for path in static_plugins]
    args += shape_flags(profiles or {})
    args.append(f"--saveEngine={os.fspath(engine)}")
    if not measure:
        args.append("--skipInference")
    for flag in extra:
        if flag.partition("=")[0] in WEAK:
            raise ExportError(
                f"{flag} does not go with strongly typed networks\n  what to do: export the model in the precision "
                'wanted, precision="fp16" for example, or quantize it with explicit Q/DQ nodes'
            )
    return [*args, *extra]


def parse_version(text: str) -> tuple[int, int]:
    """ "10.13.3" as (10, 13). Raises: ExportError for what is no version, or one before 10."""
    found = re.match(r"(\d+)\.(\d+)", str(text))
    if not found:
        raise ExportError(f"tensorrt={text!r} is not a version such as 10.3")
    version = int(found[1]), int(found[2])
    if version < (10, 0):
        raise ExportError(f"TensorRT {text} is too old: tokcompile writes files for 10.0 and later")
    return version


def shape_flags(profiles: Mapping[str, Profile]) -> list[str]:
    """--minShapes, --optShapes and --maxShapes. Raises: ExportError."""
    for name, shapes in profiles.items():
        if "," in name or "'" in name:
            raise ExportError(f"trtexec cannot name the input {name!r}: rename it to letters, digits and _")
        ordered = len(shapes) == 3 and len({len(s) for s in shapes}) == 1
        if not ordered or any(not low <= best <= high for low, best, high in zip(*shapes)):
            raise ExportError(f"the profile of {name!r} is not (smallest, best, largest) shape: {shapes!r}")
    return [
        f"--{kind}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, shapes[i]))}" for name, shapes in profiles.items())
        for i, kind in enumerate(("min", "opt", "max"))
        if profiles
    ]
