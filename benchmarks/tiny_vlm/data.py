"""Pictures of small things at free places on a canvas, with questions and answers in words; all of it follows from a seed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]
Pictures = dict[str, list[Image.Image]]

SIZE, PATCH, GRID = 224, 14, 16
# name in words: class of the data folder. Each word is one token, with the space before it, for SmolLM2.
OTHERS = (
    "anchor", "bonsai", "brain", "butterfly", "camera", "chair", "crab", "cup", "dolphin", "elephant", "helicopter", "lamp",
    "laptop", "panda", "pizza", "pyramid", "scissors", "strawberry", "sunflower", "umbrella", "watch",
)  # fmt: skip
THINGS = {"airplane": "airplanes", "face": "Faces", "leopard": "Leopards", **{word: word for word in OTHERS}}
WORDS = tuple(sorted(THINGS))
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
SMALL, LARGE = (28, 42), (42, 84)  # sides of a thing in pixels; the larger ones are for training only
# held-out pictures: the first ones of each class are looked at during training, the others only when it is over
WATCHED = 2
PARTS = {"train": 0, "watch": 1, "test": 2}


@dataclass(frozen=True)
class Thing:
    word: str
    place: int
    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Question:
    """kind: what is asked. text: the question. answer: the words expected. about: the thing or place asked for."""

    kind: str
    text: str
    answer: str
    about: str = ""


@dataclass(frozen=True)
class Scene:
    """pixels: (SIZE, SIZE, 3), uint8. things: one for a single picture, which then fills the canvas."""

    pixels: Array
    things: tuple[Thing, ...]
    single: bool


def read_pictures(folder: Path, part: str) -> Pictures:
    """The pictures of each thing: those of the gallery for "train", those of the query, split, for "watch" and "test"."""
    rows: dict[str, list[str]] = {}
    with (folder / "caltech101.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] == ("gallery" if part == "train" else "query"):
                rows.setdefault(row["class"], []).append(row["path"])
    keep = {"train": slice(None), "watch": slice(WATCHED), "test": slice(WATCHED, None)}[part]
    return {word: [Image.open(folder / p).convert("RGB") for p in sorted(rows[name])[keep]] for word, name in THINGS.items()}


def scene(pictures: Pictures, part: str, index: int, *, single: bool, seed: int = 0) -> Scene:
    """Scene number `index` of a part; the same for the same arguments."""
    rng = np.random.default_rng([seed, PARTS[part], int(single), index])
    if single:
        word = str(rng.choice(WORDS))
        picture = _cut(pictures[word], rng, SIZE, part == "train")
        return Scene(np.asarray(picture), (Thing(word, -1, 0, 0, SIZE),), True)
    canvas = Image.fromarray(_background(rng))
    things = []
    for place, word in _arrangement(rng):
        low, high = LARGE if part == "train" and rng.random() < 0.4 else SMALL
        side = int(rng.integers(low, high + 1))
        top, left = (int(v) for v in rng.integers(0, SIZE // 2 - side + 1, 2) + np.array(divmod(place, 2)) * (SIZE // 2))
        canvas.paste(_cut(pictures[word], rng, side, part == "train"), (left, top))
        things.append(Thing(word, place, top, left, side))
    return Scene(np.asarray(canvas), tuple(things), False)


def questions(of: Scene, rng: np.random.Generator, *, training: bool = True, counted: int = 1) -> list[Question]:
    """Every kind of question about a scene.

    training: also what is at a place where nothing is, and where one of the things is, not every one of them. counted: of
    how many words it is asked how often they are there; the answers are even for the first alone.
    """
    present = [t.word for t in of.things]
    absent = str(rng.choice([w for w in WORDS if w not in present]))
    seen = str(rng.choice(present))
    asked = [Question("is there", f"Is there {_a(w)}?", answer, w) for w, answer in ((seen, "yes"), (absent, "no"))]
    if of.single:
        return [Question("name", "What is in the picture?", seen), *asked]
    asked += [Question("what is at", f"What is at the {PLACES[t.place]}?", t.word, PLACES[t.place]) for t in of.things]
    free = [p for i, p in enumerate(PLACES) if i not in {t.place for t in of.things}]
    if free and training:
        place = str(rng.choice(free))
        asked.append(Question("what is at", f"What is at the {place}?", "nothing", place))
    asked.append(Question("how many things", "How many things are there?", NUMBERS[len(present)]))
    if len(present) > 1:
        words = list(dict.fromkeys(present))[:counted]
        asked += [Question("how many of it", f"How many times is there {_a(w)}?", NUMBERS[present.count(w)], w) for w in words]
    alone = [t for t in of.things if present.count(t.word) == 1]
    if alone and training:
        alone = [alone[int(rng.integers(len(alone)))]]
    return asked + [Question("where is", f"Where is the {t.word}?", PLACES[t.place], t.word) for t in alone]


def cover(things: Sequence[Thing], grid: int = GRID) -> tuple[Array, Array]:
    """Per cell of the grid, (grid * grid): the index in WORDS of the thing that covers most of it, and the share it covers."""
    cell = SIZE // grid
    word, share = np.zeros(grid * grid, np.int64), np.zeros(grid * grid, np.float32)
    edges = np.arange(grid) * cell
    for t in things:
        rows, columns = (
            np.clip(np.minimum(edges + cell, at + t.side) - np.maximum(edges, at), 0, None) / cell for at in (t.top, t.left)
        )
        covered = np.outer(rows, columns).ravel()
        word = np.where(covered > share, WORDS.index(t.word), word)
        share = np.maximum(share, covered)
    return word, share


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _arrangement(rng: np.random.Generator) -> list[tuple[int, str]]:
    """One to four things, each in a quadrant of its own.

    The first, whose copies are asked for, is there one, two or three times, evenly whatever the number of things; in half of
    the scenes the others are of one class too, so that it takes the word asked for to tell which are to be counted.
    """
    count = int(rng.integers(1, 5))
    words = [str(w) for w in rng.choice(WORDS, count, replace=False)]
    copies = int(rng.integers(1, min(count, 3) + 1))
    words[:copies] = [words[0]] * copies
    if rng.random() < 0.5:
        words[copies:] = words[copies : copies + 1] * (count - copies)
    return [(int(place), word) for place, word in zip(rng.permutation(4)[:count], words)]


def _background(rng: np.random.Generator) -> Array:
    """(SIZE, SIZE, 3): colours that run from corner to corner, with coarse noise."""
    corners = Image.fromarray(rng.integers(60, 200, (2, 2, 3)).astype(np.uint8))
    noise = Image.fromarray(rng.integers(0, 255, (14, 14, 3)).astype(np.uint8))
    smooth, rough = (np.asarray(i.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) for i in (corners, noise))
    return np.clip(smooth + (rough - 127) * 0.2, 0, 255).astype(np.uint8)


def _cut(pictures: Sequence[Image.Image], rng: np.random.Generator, side: int, vary: bool) -> Image.Image:
    """One of the pictures, a little cropped, as a square; vary: cropped more, mirrored, lighter or darker."""
    picture = pictures[int(rng.integers(len(pictures)))]
    width, height = picture.size
    share = rng.uniform(0.7 if vary else 0.85, 1.0)
    left, top = rng.uniform(0, 1 - share, 2) * (width, height)
    box = (left, top, left + width * share, top + height * share)
    cut = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if vary:
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = cut.point([min(255, int(v)) for v in np.arange(256) * rng.uniform(0.8, 1.2)] * 3)
    return cut
