"""Whether the network that TensorRT parsed is what was planned: token counts after each reduction, and plugin layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokcompile.errors import EngineError

PLUGINS = frozenset({"PLUGIN", "PLUGIN_V2", "PLUGIN_V3"})


@dataclass(frozen=True)
class Seen:
    """What the network holds. tokens: for each reduction its block, the tokens it reduced, and the length that was seen."""

    layers: int
    plugin_layers: int
    tokens: list[dict[str, Any]]


def check_network(layers: Sequence[Mapping[str, Any]], reductions: Sequence[Mapping[str, Any]], plugins: bool) -> Seen:
    """Raises: EngineError that names the first reduction which is not as planned.

    layers: as `builder.py` lists them. reductions: as `ExportReport.reductions` does.
    """
    shapes = {out["name"]: out["shape"] for layer in layers for out in layer["outputs"]}
    ours = [layer for layer in layers if layer["type"] in PLUGINS and layer["name"].startswith("reduction_")]
    tokens = []
    for r in reductions:
        seen, want = shapes.get(r["tensor"]), r["shape"]
        title = f"the {r['method']} reduction {r['n']} -> {r['k']} after block {r['block']} ({r['node']})"
        if seen is None:
            raise EngineError(f"{title} is not in the network: no layer gives {r['tensor']!r}{ADVICE}")
        # a batch that is free at run time is -1 in the network
        if len(seen) != len(want) or any(s != w for s, w in zip(seen[1:], want[1:])) or seen[0] not in (want[0], -1):
            raise EngineError(f"{title} leaves {seen} in the network, and the plan says {want}{ADVICE}")
        count = sum(layer["name"] == r["node"] for layer in ours)
        expected = int(plugins and r["fused"])
        if count != expected:
            raise EngineError(f"{title} has {count} plugin layers in the network, not {expected}{ADVICE}")
        tokens.append({"block": r["block"], "n": r["n"], "k": r["k"], "length": seen[1]})
    return Seen(len(layers), len(ours), tokens)


ADVICE = "\n  what to do: this is an error of tokcompile or of this TensorRT version; plugins=False may avoid it"
