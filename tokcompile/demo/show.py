"""What the demo says on the terminal: progress, and the numbers as tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tokcompile.cli.show import Table, note, rich_table
from tokcompile.demo.build import DEPTH, ORIGINAL, Built, pixels
from tokcompile.demo.measure import Output, Quality
from tokcompile.timing import Ratio

LEGEND = """\
FLOPs, latency: shares of the original's; latency is CPU time in onnxruntime with one thread, batch 1, the median over
  alternating pairs, with quartiles. The A/A line is the original against itself: smaller differences say nothing.
- FLOPs: latency less FLOPs: choosing and merging tokens, and short sequences being less efficient.
selection overhead: latency less that of random selection at the same blocks and counts, which chooses for free.
saliency error: mean absolute difference from the original's saliency (0 to 1) on the photograph; others: the mean over
  {others}.
CLS cosine: of the class token with the original's, on the photograph.
smaller input: the original model on a smaller photograph, its size (height x width) the one whose FLOPs are closest."""


@dataclass
class Measured:
    """All numbers of one model. quality: of the photograph and then of the other photographs.

    twin: latency of random selection at the same blocks and counts.
    """

    built: Built
    output: Output
    quality: list[Quality]
    latency: Ratio
    flops: float
    twin: Ratio | None = None

    @property
    def name(self) -> str:
        return self.built.job.method

    @property
    def over_flops(self) -> float:
        return self.latency.median - self.flops

    @property
    def selection(self) -> float | None:
        """What choosing and merging costs, as a share of the original's latency."""
        return self.latency.median - self.twin.median if self.twin else None

    @property
    def others(self) -> float | None:
        """Mean saliency error over the other photographs."""
        errors = [q.error for q in self.quality[1:]]
        return sum(errors) / len(errors) if errors else None

    def data(self) -> dict[str, Any]:
        """For report.json."""
        job, built = self.built.job, self.built
        return {
            "model": job.method, "budget_flops": job.budget, "input_size": list(job.size), "onnx": built.file,
            "onnx_bytes": built.bytes, "onnx_relative_error": built.error, "tokens_per_block": built.tokens,
            "flops": built.flops, "flops_ratio": self.flops, "selection_flops": built.overhead_flops,
            "latency": asdict(self.latency), "latency_minus_flops": self.over_flops,
            "latency_of_random_at_the_same_counts": asdict(self.twin) if self.twin else None,
            "selection_overhead": self.selection, "saliency_error": self.quality[0].error,
            "saliency_error_largest": self.quality[0].worst, "cls_cosine": self.quality[0].cosine,
            "other_photographs": [asdict(q) for q in self.quality[1:]], "note": built.note, "plan": built.plan,
        }  # fmt: skip


@contextmanager
def progress(title: str, total: int, live: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else lines; call what it gives whenever one of `total` steps is done.

    live: redraw in the background, which must not be while CPU time is measured.
    """
    bar: Any = None
    if sys.stderr.isatty():
        try:
            from rich import progress as rich
            from rich.console import Console

            columns = (rich.SpinnerColumn(), rich.TextColumn("{task.description}"), rich.BarColumn(),
                       rich.MofNCompleteColumn(), rich.TimeElapsedColumn())  # fmt: skip
            bar = rich.Progress(*columns, console=Console(stderr=True), auto_refresh=live, transient=True)
        except ImportError:
            pass
    if bar is None:
        done: list[str] = []
        note(title)

        def say(text: str) -> None:
            done.append(text)
            note(f"  {len(done)}/{total} {text}")

        yield say
        return
    with bar:
        task = bar.add_task(title, total=total)
        bar.refresh()

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {text}")
            bar.refresh()

        yield advance


def tokens_table(original: Built, rows: Sequence[Measured]) -> Table:
    headers = ("budget", "model", *map(str, range(DEPTH)))
    lines = [("", ORIGINAL, *map(str, original.tokens))]
    lines += [(f"{m.built.job.budget:g}", m.name, *map(str, m.built.tokens)) for m in rows]
    return Table(headers, lines, headers[2:], title="Patch tokens leaving each block")


def numbers_table(rows: Sequence[Measured]) -> Table:
    headers = ("budget", "model", "FLOPs", "latency", "quartiles", "- FLOPs", "selection overhead", "saliency error",
               "others", "CLS cosine")  # fmt: skip
    lines = []
    for m in rows:
        t, photograph = m.latency, m.quality[0]
        name = f"{pixels(m.built.job.size)} input" if not m.built.stages else m.name
        lines.append(
            (f"{m.built.job.budget:g}", name, f"{m.flops:.3f}", f"{t.median:.3f}", f"{t.low:.3f}-{t.high:.3f}",
             f"{m.over_flops:+.3f}", signed(m.selection), f"{photograph.error:.3f}", plain(m.others),
             f"{photograph.cosine:.3f}")
        )  # fmt: skip
    return Table(headers, lines, headers[2:], title="Against the original")


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def print_table(table: Table) -> None:
    if not rich_table(table):
        print(table)
    print()
