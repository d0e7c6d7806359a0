"""Placeholders: where image features are written into the embeddings of a prompt, read off the example inputs.

A prompt holds one placeholder token for each image token. The model finds them by comparing the token ids with the
placeholder's id and writes the features there, with `masked_scatter` or by index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tokcompile.errors import UnsupportedGraph
from tokcompile.passes.canonicalise import ancestors_of
from tokcompile.passes.graph import bind, get_attr, packet, shape, user_dependent
from tokcompile.passes.guards import Guards, equal_guards

Run = tuple[int, int]
WRITES = ("aten.masked_scatter", "aten.index_put")


class UnequalRows(UnsupportedGraph):
    """The samples of a batch hold their placeholders at different positions, so no static span describes them."""


@dataclass(frozen=True)
class Placeholders:
    """One write of features (K, D) into embeddings (B, N, D).

    node: the write. mask: the positions as (B, N) booleans, from the example inputs. rows: for every sample its runs of
    written positions, each [start, stop).
    """

    node: Node
    mask: torch.Tensor
    rows: tuple[tuple[Run, ...], ...]

    @property
    def spans(self) -> list[Run]:
        """The runs, where all samples have the same ones. Raises: UnequalRows."""
        first = self.rows[0]
        for i, row in enumerate(self.rows):
            if row != first:
                raise UnequalRows(
                    f"sample 0 has its image tokens at {text(first)}, sample {i} at {text(row)}",
                    self.node,
                    "arrange the prompts of a batch alike, or optimize for a batch of one",
                )
        return list(first)


def describe(rows: Sequence[Iterable[Run]]) -> str:
    """`5-20, 30-45`, or one such list a sample."""
    different = [text(row) for row in rows]
    return different[0] if len(set(different)) == 1 else "; ".join(f"{t} in sample {i}" for i, t in enumerate(different))


def text(runs: Iterable[Run]) -> str:
    return ", ".join(f"{start}-{stop - 1}" for start, stop in runs) or "no position"


def find_placeholders(gm: GraphModule, inputs: Sequence[Any]) -> list[Placeholders]:
    """The writes of features that depend on the inputs into a sequence of tokens, in graph order.

    gm: a traced or canonical graph with fake values; inputs: its flat example inputs.
    """
    dependent = user_dependent(gm.graph)
    found = []
    for node in gm.graph.nodes:
        features = source(node)
        if features in dependent and len(shape(node)) == 3:
            mask = written(gm, node, inputs)
            if mask is not None:
                found.append(Placeholders(node, mask, tuple(runs(row) for row in mask)))
    return found


def guard_positions(gm: GraphModule, found: Iterable[Placeholders], inputs: Sequence[Any]) -> Guards | None:
    """Conditions that later inputs have their image tokens where the example inputs have them; None where that is fixed.

    `gm` and `inputs` are those that were searched. Append the result to `Traced.checks` and its `lines` to `Traced.guards`.
    """
    fixed = []
    for one in found:
        at = one.node.args[1]
        nodes = [n for n in (at if isinstance(at, (list, tuple)) else [at]) if isinstance(n, Node)]
        text = f"image tokens are at {describe(one.rows)}"
        fixed += [(node, value, text) for node, value in zip(nodes, evaluate(gm, nodes, inputs))]
    return equal_guards(gm, fixed)


def source(node: Node) -> Node | None:
    """What a write writes."""
    name = packet(node)
    if name not in WRITES or (name == "aten.index_put" and bind(node)["accumulate"]):
        return None
    value = node.args[2]
    return value if isinstance(value, Node) else None


def written(gm: GraphModule, node: Node, inputs: Sequence[Any]) -> torch.Tensor | None:
    """The positions (B, N) that a write changes; None where it changes only some channels of a token."""
    size = shape(node)
    if packet(node) == "aten.masked_scatter":
        mask = evaluate(gm, [node.args[1]], inputs)[0].expand(size)
    else:
        at = [evaluate(gm, [i], inputs)[0] if isinstance(i, Node) else None for i in node.args[1]]
        index = tuple(slice(None) if i is None else i for i in at)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[index] = True
    whole = mask.all(-1)
    return whole if torch.equal(whole, mask.any(-1)) else None


def runs(row: torch.Tensor) -> tuple[Run, ...]:
    """The runs of True in a row, [start, stop)."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return tuple(zip(starts, stops))


def evaluate(gm: GraphModule, nodes: Sequence[Any], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The values of some nodes on the example inputs; only what they need is computed."""
    needed = ancestors_of(set(nodes))
    given = iter(inputs)
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node in needed:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = get_attr(gm, node.target) if node.op == "get_attr" else node.target(*args, **kwargs)
    return [values[n].cpu() for n in nodes]
