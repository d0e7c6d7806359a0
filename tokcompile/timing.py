"""Timing: two functions against each other, in alternating pairs and in one process."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokcompile.errors import InputError

Run = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Time of b over time of a: median and quartiles over the pairs; a, b: median seconds of one call each."""

    median: float
    low: float
    high: float
    a: float
    b: float
    pairs: int
    calls: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired(
    run_a: Run,
    run_b: Run,
    pairs: int = 15,
    *,
    warmup: int = 2,
    least: float = 0.02,
    clock: Callable[[], float] = time.process_time,
    title: str = "",
) -> Ratio:
    """Times b against a in alternating pairs (ab, ba, ab, ...) and takes the median of the ratios within pairs.

    least: seconds that one measurement lasts at least, by calling several times. clock: CPU time of this process by
    default; on other devices pass one that waits for the device. title: shown with the progress bar on a terminal.

    Example:
        >>> from tokcompile.bench import paired
        >>> ratio = paired(lambda: sum(range(1000)), lambda: sum(range(4000)), pairs=3, least=0.001)
        >>> ratio.median > 1
        True
    """
    if pairs < 1:
        raise InputError(f"at least one pair has to be timed, not {pairs}")
    for _ in range(warmup):
        run_a()
        run_b()
    once = max(measure(run_a, 1, clock), 1e-7)
    calls = max(1, round(least / once))
    times = np.empty((pairs, 2))
    with no_collection():
        for i in track(range(pairs), title):
            for j in (0, 1) if i % 2 == 0 else (1, 0):
                times[i, j] = max(measure((run_a, run_b)[j], calls, clock), 1e-9) / calls
    low, median, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    a, b = np.median(times, axis=0)
    return Ratio(float(median), float(low), float(high), float(a), float(b), pairs, calls)


def measure(run: Run, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of the measurements."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def track(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr where that is a terminal and rich is installed."""
    if not title or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress
    except ImportError:
        return items

    def bar() -> Iterator[Any]:
        # drawn between measurements only: a refreshing thread would count as CPU time of this process
        with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
            task = progress.add_task(escape(title), total=len(items))
            for item in items:
                progress.refresh()
                yield item
                progress.advance(task)

    return bar()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with so many threads for torch."""
    if count < 1:
        raise InputError(f"the number of threads is a positive number, not {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
