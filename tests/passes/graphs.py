"""Small graphs whose first input is reduced at once, and plain indexing to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.conftest import leaves
from tokcompile.passes.canonicalise import canonicalise
from tokcompile.passes.find import Block, Structure
from tokcompile.passes.rewrite import Rewriter, Rewritten
from tokcompile.passes.splice import Splice
from tokcompile.passes.stages import Stage
from tokcompile.passes.tokens import Batch, Label, Seq, Space
from tokcompile.passes.trace import trace
from tokcompile.recipe import Keep, Merge, Recipe, Site

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    """A function as a module; `own` become its parameters and buffers."""

    def __init__(self, fn: Callable[..., Any], **own: Any):
        super().__init__()
        self.fn = fn
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(*inputs)


def canonical(fn: Callable[..., Any], *inputs: Any) -> GraphModule:
    """The canonical graph of a function or module."""
    module = fn if isinstance(fn, nn.Module) else Function(fn)
    traced = trace(module.eval(), inputs)
    return canonicalise(traced.gm, traced.inputs)


def ops(gm: GraphModule) -> list[str]:
    """The calls of a graph in order: "add.Tensor"."""
    return [str(n.target).replace("aten.", "") for n in gm.graph.nodes if n.op == "call_function"]


def fixed(index: Tensor) -> Recipe:
    """A method that keeps these tokens, (B, k), in this order."""
    values, ordered = index.tolist(), ascending(index)
    return Recipe("fixed", lambda tokens, site: Keep(torch.tensor(values), ordered=ordered))


def merging(index: Tensor, sources: Tensor, slots: Tensor, proportional: bool = False) -> Recipe:
    """A method that always merges these tokens; it tracks sizes."""
    values = [one.tolist() for one in (index, sources, slots)]
    return Recipe("merging", lambda tokens, site: Merge(*map(torch.tensor, values)), track_size=True,
                  proportional=proportional)  # fmt: skip


def ascending(index: Tensor) -> bool:
    return bool((index.diff(dim=1) > 0).all())


def subset(batch: int, n: int, k: int, sort: bool = True, seed: int = 0) -> Tensor:
    """(B, k) random positions, others for every sample."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(n, generator=draw)[:k] for _ in range(batch)])
    return rows.sort(-1).values if sort else rows


def rewriter(
    gm: GraphModule,
    recipe: Recipe,
    n: int,
    k: int,
    *,
    prefix: int = 0,
    suffix: int = 0,
    unit: int = 1,
    axis: int = 1,
    batch_axis: int | None = 0,
    leading: bool = False,
    **options: Any,
) -> Rewriter:
    """A Rewriter that reduces the first input of the graph; no block follows it, unless what it gives is to lead to one."""
    x = gm.graph.find_nodes(op="placeholder")[0]
    stage = Stage(prefix + n * unit + suffix, prefix, suffix, None, True)
    block = Block(0, "blocks.0", [], x, x, None, axis, batch_axis, stage)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    site = Site(n, k, prefix // unit, suffix // unit)
    splice = Splice(recipe, block, x, k, site, prefix, unit)
    blocks = [block, Block(1, "blocks.1", [], x, gm.graph.output_node().args[0][0], None, axis, batch_axis, stage)]
    return Rewriter(gm, Structure(blocks[: 1 + leading], [stage], [], order), [splice], **{"outputs": "reduced", **options})


def reduced(fn: Any, inputs: Sequence[Tensor], index: Tensor, n: int, **options: Any) -> Rewritten:
    """The rewritten graph of `fn` in which only the tokens `index` of the first input are left."""
    return rewriter(canonical(fn, *inputs), fixed(index), n, index.shape[1], **options).run()


def rows(value: Tensor, label: Label | None, kept: dict[Space, Tensor]) -> Tensor:
    """What `label` says is left of a full tensor, by indexing each sample."""
    if label is None:
        return value
    atoms = [a for axis in label for a in axis]
    x = value.reshape([a if isinstance(a, int) else a.size if isinstance(a, Batch) else a.old for a in atoms])
    where = next((i for i, a in enumerate(atoms) if isinstance(a, Batch)), None)
    for at, seq in enumerate(atoms):
        if not isinstance(seq, Seq):
            continue
        index = positions(seq, kept)
        if where is None:
            assert index.shape[0] == 1
            x = x.index_select(at, index[0])
        else:
            x = torch.stack(
                [x.select(where, b).index_select(at - (at > where), index[b]) for b in range(x.shape[where])], where
            )
    sizes = [[a if isinstance(a, int) else a.size if isinstance(a, Batch) else a.new for a in axis] for axis in label]
    return x.reshape([torch.tensor(s, dtype=torch.int64).prod().item() if s else 1 for s in sizes])


def positions(seq: Seq, kept: dict[Space, Tensor]) -> Tensor:
    """(B, new) positions on the old axis."""
    batch = next(iter(kept.values())).shape[0]
    parts, start = [], 0
    for part in seq.parts:
        if isinstance(part, int):
            parts.append(torch.arange(start, start + part).expand(batch, -1))
            start += part
        else:
            parts.append(kept[part] + start)
            start += part.root_n
    return torch.cat(parts, 1)


def run(gm: GraphModule, *inputs: Any) -> Any:
    with torch.no_grad():
        return gm(*inputs)


def same(fn, *inputs):
    """The canonical graph of `fn`, after checking that it gives what `fn` gives, twice, and has no in-place op left."""
    module = fn if isinstance(fn, nn.Module) else Function(fn)
    with torch.no_grad():
        want = leaves(module(*[v.clone() for v in inputs]))
    gm = canonical(module, *[v.clone() for v in inputs])
    for _ in range(2):
        got = leaves(run(gm, *[v.clone() for v in inputs]))
        assert len(got) == len(want)
        for g, w in zip(got, want):
            assert g.dtype == w.dtype
            assert torch.equal(g, w)
    assert not [op for op in ops(gm) if op.split(".")[0].endswith("_") and not op.startswith("__")]
    return gm
