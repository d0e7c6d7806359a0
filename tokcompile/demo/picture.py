"""The picture: which patches each method keeps or merges, block by block, and what that does to the saliency."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokcompile.demo import weights
from tokcompile.demo.build import pixels
from tokcompile.demo.measure import shrunk
from tokcompile.demo.trackers import Stage
from tokcompile.errors import TokcompileError
from tokcompile.files import atomic

Array = np.ndarray[Any, Any]

CELL = 2 * weights.PATCH  # the picture shows the photograph twice as fine as the model sees it
GREY, DARK = np.array([0.299, 0.587, 0.114]), 0.3
LINE = "white"
PANEL, LABEL, HEAD = 2.35, 1.75, 0.95  # inches
COLUMNS = 5


@dataclass
class Row:
    """One model. stages: what is left at the shown blocks, or none for a model of its own input size `size`."""

    title: str
    lines: Sequence[str]
    saliency: Array
    stages: Sequence[Stage] = ()
    size: tuple[int, int] = weights.WHOLE


@dataclass
class Picture:
    """All that is drawn for one budget. saliency: (224, 224) of the original; blocks: the ones that `stages` follow."""

    title: str
    image: Any
    saliency: Array
    blocks: Sequence[int]
    rows: list[Row] = field(default_factory=list)
    grid: int = weights.SIZE // weights.PATCH

    @cached_property
    def canvas(self) -> Array:
        return colours(weights.preprocess(self.image, self.grid * CELL))

    @cached_property
    def box(self) -> tuple[slice, slice]:
        return weights.content_box(self.image.height, self.image.width)


def colours(image: Any) -> Array:
    """(H, W, 3) in 0..1 of a model's input (1, 3, H, W)."""
    values = image[0].permute(1, 2, 0).numpy() * np.array(weights.STD) + np.array(weights.MEAN)
    return np.clip(values, 0, 1)


def enlarge(cells: Array, factor: int) -> Array:
    """(h, w, ...) -> (h * factor, w * factor, ...)."""
    return cells.repeat(factor, 0).repeat(factor, 1)


def paint(canvas: Array, stage: Stage, grid: int) -> Array:
    """The canvas with dropped patches dark and grey and every merged region in its mean colour."""
    cell = canvas.shape[0] // grid
    patches = canvas.reshape(grid, cell, grid, cell, 3).mean((1, 3)).reshape(-1, 3)
    owner, painted = stage.owner, canvas.copy()
    dropped = enlarge((owner < 0).reshape(grid, grid), cell)
    painted[dropped] = (canvas @ GREY)[dropped][:, None] * DARK
    kept = owner >= 0
    sums = np.stack([np.bincount(owner[kept], patches[kept, c], stage.count) for c in range(3)], 1)
    means = sums / np.maximum(stage.sizes, 1)[:, None]
    merged = enlarge(in_group(stage).reshape(grid, grid), cell)
    painted[merged] = enlarge(means[np.maximum(owner, 0)].reshape(grid, grid, 3), cell)[merged]
    return painted


def in_group(stage: Stage) -> Array:
    """(N,): whether the patch shares its token with another one."""
    return (stage.owner >= 0) & (stage.sizes[np.maximum(stage.owner, 0)] > 1)


def borders(stage: Stage, grid: int) -> list[list[tuple[int, int]]]:
    """Line segments, in patches, around merged regions and between kept and dropped patches."""
    owner = stage.owner.reshape(grid, grid)
    special = in_group(stage).reshape(grid, grid) | (owner < 0)
    right = (owner[:, :-1] != owner[:, 1:]) & (special[:, :-1] | special[:, 1:])
    below = (owner[:-1] != owner[1:]) & (special[:-1] | special[1:])
    lines = [[(int(c) + 1, int(r)), (int(c) + 1, int(r) + 1)] for r, c in np.argwhere(right)]
    return lines + [[(int(c), int(r) + 1), (int(c) + 1, int(r) + 1)] for r, c in np.argwhere(below)]


def draw(picture: Picture, path: Path) -> None:
    """Writes the picture as PNG. Raises: TokcompileError where matplotlib is missing."""
    try:
        figure_module = importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError as error:
        raise TokcompileError(f"the demo needs matplotlib ({error}): pip install matplotlib") from error
    count = len(picture.rows) + 1
    width, height = LABEL + COLUMNS * PANEL + 0.1, HEAD + count * (PANEL + 0.3) + 0.45
    figure = figure_module.Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(
        count, COLUMNS, squeeze=False,
        gridspec_kw=dict(
            left=LABEL / width, right=1 - 0.1 / width, top=1 - HEAD / height, bottom=0.45 / height,
            wspace=0.05, hspace=0.3 / PANEL,
        ),
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    figure.text(0.15 / width, 1 - 0.18 / height, picture.title, fontsize=15, weight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.5 / height, LEGEND, fontsize=9.5, va="top", color="0.25")
    worst = max(0.1, *(float(np.abs(row.saliency - picture.saliency)[picture.box].max()) for row in picture.rows))
    draw_head(axes[0], picture)
    for row, line in zip(picture.rows, axes[1:], strict=True):
        draw_row(line, picture, row, worst)
    color_bar(figure, axes[-1], worst, height)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


LEGEND = "Merged patches: one outlined region in its mean colour.  Dropped patches: dark grey.  Photograph: untouched."


def inside(picture: Picture, values: Array) -> Array:
    """The values inside the photograph; the bars beside it, where they mean nothing, are left blank."""
    blank = np.full_like(values, np.nan)
    blank[picture.box] = values[picture.box]
    return blank


def draw_head(axes: Sequence[Any], picture: Picture) -> None:
    """The original's row."""
    label(axes[0], "original", [f"{picture.grid**2} patches", "in every block"])
    draw_whole(axes, picture, weights.WHOLE, picture.saliency)
    show_saliency(axes[3], inside(picture, picture.saliency), "saliency of the original", dict(cmap="gray", vmin=0, vmax=1))


def draw_row(axes: Sequence[Any], picture: Picture, row: Row, worst: float) -> None:
    """One model: its tokens at the shown blocks, its saliency and the error of that."""
    label(axes[0], row.title, row.lines)
    for axis, block, stage in zip(axes, picture.blocks, row.stages, strict=False):
        painted = paint(picture.canvas, stage, picture.grid)
        show(axis, painted, f"after block {block}: {stage.count} tokens", picture.grid, picture.grid)
        outline(axis, borders(stage, picture.grid), 0.7)
    if not row.stages:
        draw_whole(axes, picture, row.size, row.saliency)
    show_saliency(axes[3], inside(picture, row.saliency), "saliency", dict(cmap="gray", vmin=0, vmax=1))
    error = inside(picture, np.abs(row.saliency - picture.saliency))
    title = f"error: {np.nanmean(error):.3f} on average"
    show_saliency(axes[4], error, title, dict(cmap="inferno", vmin=0, vmax=worst))


def draw_whole(axes: Sequence[Any], picture: Picture, size: tuple[int, int], saliency: Array) -> None:
    """A model that keeps all its tokens: what it sees, its patches, and the photograph in the light of its saliency."""
    rows, columns = (side // weights.PATCH for side in size)
    seen = picture.canvas if size == weights.WHOLE else colours(shrunk(weights.preprocess(picture.image), size))
    show(axes[0], seen, f"photograph at {pixels(size)} px", rows, columns)
    show(axes[1], seen, f"its {rows * columns} patches", rows, columns)
    lines = [[(0, y), (columns, y)] for y in range(1, rows)] + [[(x, 0), (x, rows)] for x in range(1, columns)]
    outline(axes[1], lines, 0.4)
    light = enlarge(saliency, CELL // weights.PATCH)[..., None]
    show(axes[2], picture.canvas * (0.15 + 0.85 * light), "lit by its saliency", picture.grid, picture.grid)


def show(axis: Any, image: Array, title: str, rows: int, columns: int) -> Any:
    """An image whose coordinates are patches, filling the square of its panel as it fills the photograph."""
    axis.imshow(image, extent=(0, columns, rows, 0), aspect=columns / rows, interpolation="antialiased")
    axis.set_title(title, fontsize=9.5, pad=3)
    return axis


def show_saliency(axis: Any, values: Array, title: str, style: dict[str, Any]) -> None:
    axis.imshow(values, interpolation="nearest", **style)
    axis.set_title(title, fontsize=9.5, pad=3)


def outline(axis: Any, lines: Sequence[Any], width: float) -> None:
    collections = importlib.import_module("matplotlib.collections")
    axis.add_collection(collections.LineCollection(lines, colors=LINE, linewidths=width, capstyle="projecting"))


def label(axis: Any, title: str, lines: Sequence[str]) -> None:
    """The name and numbers of a model, left of its row."""
    at = dict(xycoords="axes fraction", textcoords="offset points", ha="right", annotation_clip=False)
    axis.annotate(title, (0, 1), (-10, -2), fontsize=13, weight="bold", va="top", **at)
    axis.annotate("\n".join(lines), (0, 1), (-10, -24), fontsize=9.5, va="top", linespacing=1.5, color="0.25", **at)


def color_bar(figure: Any, axes: Sequence[Any], worst: float, height: float) -> None:
    """The scale of the errors, under the last column."""
    place = axes[4].get_position()
    bar = figure.add_axes((place.x0, 0.28 / height, place.width, 0.08 / height))
    bar.imshow(np.linspace(0, 1, 256)[None], cmap="inferno", aspect="auto", extent=(0, worst, 0, 1))
    bar.set_yticks([])
    bar.tick_params(labelsize=8, length=2, pad=1)
