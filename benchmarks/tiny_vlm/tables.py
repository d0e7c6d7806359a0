"""From the answers and times on disk to tables: accuracies, paired differences and their standard errors.

    python -m benchmarks.tiny_vlm tables

Several questions are about one scene, so standard errors are those of sums over scenes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import save, table
from benchmarks.tiny_vlm.data import PLACES, WORDS
from benchmarks.tiny_vlm.evaluate import REDUCED
from benchmarks.tiny_vlm.reduce import BETWEEN, INSIDE, SMALLER, STEPWISE, TOWER

Scores = dict[tuple[int, str, int], bool]  # (scene, kind, how many of that kind came before) -> right
KINDS = ("name", "what is at", "where is", "is there", "how many things", "how many of it")
GUESS = {"name": 1 / len(WORDS), "what is at": 1 / len(WORDS), "where is": 1 / len(PLACES), "is there": 1 / 2}
ERRORS = 3  # standard errors by which a kind has to beat guessing, and to drop with the wrong picture


def mean(values: Scores) -> tuple[float, float]:
    """The mean and its standard error, scenes drawn at random."""
    return cluster([k[0] for k in values], [float(v) for v in values.values()])


def difference(a: Scores, b: Scores) -> tuple[float, float, int]:
    """The mean of b - a over the questions that both were asked, its standard error, and their number."""
    shared = [k for k in a if k in b]
    return (*cluster([k[0] for k in shared], [float(b[k]) - float(a[k]) for k in shared]), len(shared))


def cluster(groups: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    x = np.array(values)
    middle = x.mean()
    sums: dict[int, float] = {}
    for group, value in zip(groups, x - middle):
        sums[group] = sums.get(group, 0.0) + value
    count = len(sums)
    spread = np.sqrt(sum(v * v for v in sums.values()) * count / max(count - 1, 1)) / len(x)
    return float(middle), float(spread)


def read(path: Path, kinds: Iterable[str] = KINDS) -> Scores:
    """A file of [scene, kind, words right, newline right]; both count."""
    seen: Counter[tuple[int, str]] = Counter()
    made: Scores = {}
    for number, kind, said, ended in json.loads(path.read_text()):
        if kind in kinds:
            made[number, kind, seen[number, kind]] = said and ended
        seen[number, kind] += 1
    return made


def shown(value: tuple[float, ...]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def signed(value: tuple[float, ...]) -> str:
    return f"{value[0]:+.3f} ± {value[1]:.3f}"


def gates(results: Path) -> tuple[str, list[str]]:
    """The table of what was learnt, and the kinds that passed."""
    asked = json.loads((results / "questions.json").read_text())
    rows, passed = [], []
    for kind in KINDS:
        single = "single-" if kind == "name" else ""
        files = [results / f"{single}{name}.json" for name in ("full", "swapped")]
        if not all(f.exists() for f in files):
            continue
        full, other = (read(f, [kind]) for f in files)
        said = Counter(answer for of, _, k, answer in asked if k == kind and of == ("single" if single else "canvas"))
        if not said:
            continue
        guess = max(GUESS.get(kind, 0.0), max(said.values()) / sum(said.values()))
        right, drop = mean(full), difference(other, full)
        ok = right[0] - guess > ERRORS * right[1] and drop[0] > ERRORS * drop[1]
        passed += [kind] * ok
        rows.append((kind, len(full), f"{guess:.3f}", shown(right), shown(mean(other)), signed(drop), "yes" if ok else "no"))
    titles = ("question", "n", "best guess", "right", "with another picture", "difference", "passed")
    return table(titles, rows), passed


def conditions() -> list[tuple[str, str, str, int, str]]:
    """(place, method, file, tokens, the file of random selection there)."""
    made = [("in the tower", m, f"tower-{m}-{k}", k, f"between-random-{k}") for k, at in TOWER.items() for m in at]
    made += [("before the LM", m, f"between-{m}-{k}", k, f"between-random-{k}") for k, at in BETWEEN.items() for m in at]
    made += [("in the LM, layer 2", m, f"inside-{m}-{k}", k, f"inside-random-{k}") for k, at in INSIDE.items() for m in at]
    made += [("in the LM, by depth", m, f"stepwise-{m}-{k}", k, f"inside-random-{k}") for k, at in STEPWISE.items() for m in at]
    return made + [("input", "smaller input", f"smaller-input-{g * g}", g * g, "") for g in SMALLER]


def agreement(results: Path) -> str:
    """Whether single prefills, compiled by tokcompile as a whole, say the same as packed questions."""
    said = []
    checks = (("check", "full", "unreduced"), ("check-divprune-28", "between-divprune-28", "divprune, 28 tokens"))
    for single, packed, what in checks:
        if (results / f"{single}.json").exists():
            one, other = read(results / f"{single}.json"), read(results / f"{packed}.json")
            said.append(f"{sum(other[k] == v for k, v in one.items())} of {len(one)} ({what})")
    return "Single prefills and packed questions agree: " + ", ".join(said)


def comparison(results: Path, kind: str, speed: dict[str, Any]) -> str:
    """One kind of question under all conditions that were measured."""
    rows: list[tuple[Any, ...]] = []
    asked: set[tuple[int, str, int]] = set()
    full = results / "full.json"
    whole = read(full, [kind]) if full.exists() else {}
    for place, method, name, tokens, baseline in sorted(conditions(), key=lambda c: (-c[3], c[0], c[1])):
        if not (results / f"{name}.json").exists() or not whole:
            continue
        scores = read(results / f"{name}.json", [kind])
        if not scores:
            continue
        asked |= scores.keys()
        other = results / f"{baseline}.json"
        against = signed(difference(read(other, [kind]), scores)) if baseline and other.exists() and name != baseline else ""
        time = timed(speed.get(name))
        lost = signed(difference(whole, scores))
        removed = f"{1 - tokens / 256:.1%}"
        rows.append((tokens, removed, place, method, len(scores), shown(mean(scores)), lost, against, *time))
    if whole:  # more was asked about the whole picture: the questions that the others were asked count
        same = {k: v for k, v in whole.items() if k in asked} or whole
        rows.insert(0, (256, "0.0%", "", "full", len(same), shown(mean(same)), "", "", *timed(speed.get("A/A"))))
    titles = ("tokens", "removed", "place", "method", "n", "right", "minus full", "minus random", "time", "FLOPs")
    return table(titles, rows)


def timed(row: dict[str, Any] | None) -> tuple[str, str]:
    """The ratio of times to the first token with its quartiles, and that of FLOPs."""
    if row is None:
        return "", ""
    return f"{row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", f"{row['flops_ratio']:.3f}"


def times(speed: dict[str, Any]) -> str:
    """All that was timed."""
    measured = {name: row for name, row in speed.items() if "median" in row}
    rows = [(n, *timed(row), f"{row['a'] * 1000:.0f}", f"{row['b'] * 1000:.0f}") for n, row in measured.items()]
    return table(("reduced", "time ratio", "FLOPs ratio", "full, ms", "reduced, ms"), rows)


def pairs(results: Path, kind: str, tokens: int) -> str:
    """How many standard errors lie between each two methods at one budget."""
    found = [c for c in conditions() if c[3] == tokens and (results / f"{c[2]}.json").exists()]
    scores = {f"{c[1]} ({c[2].partition('-')[0]})": read(results / f"{c[2]}.json", [kind]) for c in found}
    scores = {k: v for k, v in scores.items() if v}
    rows = []
    for a in scores:
        cells = []
        for b in scores:
            gap = difference(scores[b], scores[a]) if a != b else (0.0, 0.0, 0)
            cells.append("" if a == b else f"{gap[0] / max(gap[1], 1e-9):+.1f}" if gap[1] else "0")
        rows.append((a, *cells))
    return table(("row minus column, in standard errors", *scores), rows)


def tables(build: Path) -> None:
    """Writes build/tiny_vlm.md and .json."""
    results = build / "results"
    path = build / "speed.json"
    speed = json.loads(path.read_text()) if path.exists() else {}
    text, passed = gates(results)
    parts = ["### What was learnt", text, agreement(results)]
    for kind in REDUCED:
        if kind not in passed:  # what is not read off the picture cannot suffer from a reduction
            parts += [f"### {kind}", "This kind did not pass: nothing is compared with it."]
            continue
        parts += [f"### {kind}", comparison(results, kind, speed)]
        parts += [f"#### {kind}, methods against each other, 28 tokens", pairs(results, kind, 28)]
    parts += ["### Time to the first token", times(speed)]
    whole = "\n\n".join(parts)
    save(build, "tiny_vlm", {"passed": passed, "speed": speed}, whole)
    print(whole)
