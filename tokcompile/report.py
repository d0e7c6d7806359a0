"""What was found, what was done, and what it costs: printable and JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tokcompile.passes.cost import Term, total
from tokcompile.passes.tokens import new

if TYPE_CHECKING:
    from tokcompile.compiler import Analysis, Compiled
    from tokcompile.passes.find import Block
    from tokcompile.passes.rewrite import Rewritten


@dataclass
class Report:
    """blocks: one row per block found, with the tokens that come in and those that are left. flops, original_flops: of the
    whole model, without the reductions' own work, which is overhead_flops. recoveries: where tokens were given back, and
    whether blocks follow. traced_again: modules that mix tokens along the sequence, which are called with fewer. cut_off: how
    many tokens of a batch the model cuts off later (padding); they are dropped first. guards: what was fixed from the example
    inputs while tracing. seconds: time spent in each pass."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    reductions: list[dict[str, Any]] = field(default_factory=list)
    flops: int = 0
    original_flops: int = 0
    overhead_flops: int = 0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    traced_again: list[str] = field(default_factory=list)
    cut_off: int = 0
    unrecognised: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.original_flops if self.original_flops else 1.0

    def json(self) -> str:
        return json.dumps({**asdict(self), "flops_ratio": self.flops_ratio}, indent=2)

    def __str__(self) -> str:
        lines = [f"{'block':<8}{'tokens':>8}{'left':>8}  module"]
        for b in self.blocks:
            why = "  not reducible: " + b["why_not"] if b["why_not"] else ""
            lines.append(f"{b['index']:<8}{b['tokens']:>8}{b['left']:>8}  {b['path']}{why}")
        lines.append(
            f"FLOPs {self.flops / 1e9:.3f} G of {self.original_flops / 1e9:.3f} G ({self.flops_ratio:.3f}); "
            f"selection and merging {self.overhead_flops / 1e9:.4f} G"
        )
        for r in self.recoveries:
            cost = "; blocks follow, so part of the gain is lost" if r["inside"] else ""
            lines.append(f"tokens given back at {r['node']} ({r['op']}, {r['module'] or 'no module'}): {r['reason']}{cost}")
        if self.traced_again:
            count = len(self.traced_again)
            lines.append(
                f"traced again over fewer tokens, since {'they mix' if count > 1 else 'it mixes'} them along the sequence: "
                + ", ".join(self.traced_again[:3])
                + f" and {count - 3} more" * (count > 3)
            )
        if self.cut_off:
            lines.append(f"dropped before all others, since the model cuts them off later (padding): {self.cut_off} tokens")
        lines += [f"not recognised: {text}" for text in self.unrecognised]
        lines += [f"fixed while tracing: {text}" for text in self.guards]
        return "\n".join(lines)


def tokens_left(block: Block, rewritten: Rewritten | None) -> int:
    """The length of a block's token axis after its own reduction."""
    label = rewritten.labels.get(block.out) if rewritten else None
    return new(label[block.token_axis]) if label is not None else block.stage.length


def make_report(analysis: Analysis, compiled: Compiled, original: list[Term]) -> Report:
    rewritten = compiled.rewritten
    left = {b.index: tokens_left(b, rewritten) for b in analysis.structure.blocks}
    gone = Counter(dict.fromkeys(left, 0))
    for r in compiled.plan.reductions:
        gone[r.block] += (r.n - r.k) * r.unit
    blocks = [
        {
            "index": b.index,
            "path": b.path,
            "length": b.stage.length,
            "prefix": b.stage.prefix,
            "suffix": b.stage.suffix,
            "grid": b.stage.grid,
            "why_not": b.why_not,
            "parallel": b.parallel,
            "tokens": left[b.index] + gone[b.index],
            "left": left[b.index],
        }
        for b in analysis.structure.blocks
    ]
    return Report(
        blocks,
        [asdict(r) for r in compiled.plan.reductions],
        compiled.flops,
        total(original),
        rewritten.overhead_flops if rewritten else 0,
        [asdict(r) for r in rewritten.recoveries] if rewritten else [],
        list(rewritten.again) if rewritten else [],
        max((int(s.hidden.sum()) for s in rewritten.spaces if s.hidden is not None), default=0) if rewritten else 0,
        analysis.structure.unrecognised,
        [*analysis.guards, *(check.guard for check in (rewritten.checks if rewritten else ()))],
        dict(analysis.seconds),
    )
