"""Answers of the trained model about held-out pictures, full and reduced, one JSON file per condition.

    python -m benchmarks.tiny_vlm evaluate --data ../shared/data

A word counts as right where it is the likeliest of the whole vocabulary. Where the reduction comes before the language
model, all questions about a scene go through it at once, each seeing the visual tokens and itself; inside the language
model every question is a prefill of its own, compiled by `tokcompile.optimize`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tiny_vlm import model as parts
from benchmarks.tiny_vlm import reduce
from benchmarks.tiny_vlm.data import GRID, Question, Scene, questions, read_pictures, scene
from benchmarks.tiny_vlm.packing import IGNORED, encode, pack
from benchmarks.tiny_vlm.reduce import Reduced
from tokcompile.errors import BudgetError
from tokcompile.llm import Generator

SPANS = [(parts.PREFIX, parts.PREFIX + GRID * GRID)]
SCENES, SINGLES = 256, 128
REDUCED = ("what is at",)  # what is asked where something is reduced
ASKED = 512  # and how often, at least: of the first scenes that hold so many of these questions
CHECKED = 48  # as many answers come from single prefills too, unreduced and after divprune, as a check of the packing
LONGEST = 3  # tokens of an answer, newline included
BATCH = 16


@dataclass
class Trained:
    """lm: with the updates merged into its weights. shallow: the same cut to one layer."""

    lm: Any
    projector: parts.Projector
    tokenizer: Any
    shallow: nn.Module

    @classmethod
    def load(cls, build: Path, path: Path) -> Trained:
        lm, projector = parts.load_trained(build / "llm", path, torch.bfloat16)
        return cls(lm, projector, parts.tokenizer(build / "llm"), cut(lm, 1))

    def prompt(self, shown: Reduced) -> Tensor:
        """(B, 1 + k, D): the first token and the visual ones."""
        visual = self.projector(shown.features.float(), shown.cells).to(self.lm.dtype)
        first = self.lm.model.embed_tokens(torch.full((len(visual), 1), parts.START))
        return torch.cat([first, visual], 1)


@dataclass
class Asked:
    """scenes, and the questions about each, with those as ids."""

    scenes: list[Scene]
    questions: list[list[Question]]
    ids: list[list[tuple[list[int], int]]]

    @classmethod
    def make(cls, data: Path, tokenizer: Any, *, single: bool, count: int = SCENES) -> Asked:
        pictures = read_pictures(data, "test")
        scenes = [scene(pictures, "test", i, single=single) for i in range(count)]
        asked = [questions(s, np.random.default_rng([9, i]), training=False) for i, s in enumerate(scenes)]
        return cls(scenes, asked, [encode(tokenizer, a) for a in asked])

    def only(self, kinds: tuple[str, ...], least: int) -> Asked:
        """The questions of these kinds, about the first scenes that have so many of them."""
        made = Asked([], [], [])
        for one, asked, ids in zip(self.scenes, self.questions, self.ids):
            if sum(map(len, made.questions)) < least:
                chosen = [i for i, q in enumerate(asked) if q.kind in kinds]
                made.scenes.append(one)
                made.questions.append([asked[i] for i in chosen])
                made.ids.append([ids[i] for i in chosen])
        return made


def cut(lm: Any, layers: int) -> nn.Module:
    """A model of the first layers, which share their weights with it."""
    import copy

    from transformers import LlamaForCausalLM

    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
    made.model.embed_tokens, made.model.norm, made.lm_head = lm.model.embed_tokens, lm.model.norm, lm.lm_head
    made.model.layers = lm.model.layers[:layers]
    made.model.rotary_emb = lm.model.rotary_emb
    return made.eval()


@torch.no_grad()
def answers(trained: Trained, shown: Reduced, asked: Asked) -> list[list[tuple[bool, bool]]]:
    """By scene and question: whether the words were right, and whether the newline after them was."""
    made: dict[int, list[tuple[bool, bool]]] = {}
    by_length = torch.tensor([sum(len(ids) for ids, _ in row) for row in asked.ids]).argsort(stable=True)
    shown = shown.first(len(asked.scenes))
    for rows in by_length.split(BATCH):
        cells = shown.cells[rows]
        prompt = trained.prompt(Reduced(shown.features[rows], cells))
        text = pack([asked.ids[r] for r in rows], cells.shape[1])
        first = torch.zeros(len(prompt), 1, dtype=torch.long)
        positions = torch.cat([first, cells + parts.PREFIX, text.positions], 1)
        mask = torch.zeros(text.seen.shape, dtype=trained.lm.dtype).masked_fill(~text.seen, -1e4)
        hidden = trained.lm.model(
            inputs_embeds=torch.cat([prompt, trained.lm.model.embed_tokens(text.ids)], 1),
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[:, prompt.shape[1] :]
        wanted = text.targets != IGNORED
        right = torch.ones_like(wanted)
        right[wanted] = trained.lm.lm_head(hidden[wanted]).argmax(-1) == text.targets[wanted]
        for row, number in enumerate(rows.tolist()):
            stop, made[number] = 0, []
            for ids, length in asked.ids[number]:
                start, stop = stop, stop + len(ids)
                said = right[row, start + length - 1 : stop - 1]
                made[number].append((bool(said[:-1].all()), bool(said[-1])))
    return [made[number] for number in range(len(asked.ids))]


@torch.no_grad()
def inside(
    trained: Trained, shown: Reduced, asked: Asked, method: str | None, tokens: int, layer: int = reduce.LAYER
) -> list[Any]:
    """[scene, kind, right, ended]; each question is a prefill, reduced at the entrance of a layer (full: method None), and
    greedy decoding after it."""
    batch = 16
    found = [(i, q, ids, n) for i, (a, e) in enumerate(zip(asked.questions, asked.ids)) for q, (ids, n) in zip(a, e)]
    made: dict[int, Any] = {}
    for length in sorted({n for _, _, _, n in found}):
        rows = [r for r, f in enumerate(found) if f[3] == length]
        text = trained.lm.model.embed_tokens(torch.tensor([found[r][2][:length] for r in rows]))
        prompts = torch.cat([trained.prompt(shown)[[found[r][0] for r in rows]], text], 1)
        prompts = torch.cat([prompts, prompts[: -len(prompts) % batch]])  # whole batches; the added answers are not counted
        opt = reduce.in_language_model(trained.lm, prompts[:batch], SPANS, method, tokens, layer)
        generator = Generator(opt, trained.lm, max_new_tokens=LONGEST)
        said = torch.cat([generator(inputs_embeds=p).tokens for p in prompts.split(batch)]).tolist()
        for r, words in zip(rows, said):
            i, question, ids, _ = found[r]
            words, wanted = words[: len(ids) - length], ids[length:]
            made[r] = [i, question.kind, words[:-1] == wanted[:-1], words[-1] == wanted[-1]]
    return [made[r] for r in range(len(found))]


def chosen_between(trained: Trained, shown: Reduced, method: str, tokens: int) -> Reduced:
    """What a method keeps between projector and language model; the text after the visual tokens does not matter to it."""
    newline = trained.tokenizer("\n", add_special_tokens=False).input_ids
    end = trained.lm.model.embed_tokens(torch.tensor([newline] * len(shown.features)))
    with torch.no_grad():
        prompts = torch.cat([trained.prompt(shown), end], 1)
    index = reduce.between(prompts, trained.shallow, method, tokens, SPANS)
    features = shown.features.gather(1, index[..., None].expand(-1, -1, shown.features.shape[-1]))
    return Reduced(features, shown.cells.gather(1, index))


def swapped(shown: Reduced) -> Reduced:
    """Every scene with the visual tokens of another one."""
    half = len(shown.features) // 2
    return Reduced(shown.features.roll(half, 0), shown.cells.roll(half, 0))


def flat(asked: Asked, scores: list[list[tuple[bool, bool]]]) -> list[Any]:
    return [[i, q.kind, said, ended] for i, (a, s) in enumerate(zip(asked.questions, scores)) for q, (said, ended) in zip(a, s)]


def evaluate(data: Path, build: Path, trained_path: Path, only: str = "") -> None:
    """Writes build/results/*.json, skipping those that are there; only: conditions whose names contain this."""
    trained = Trained.load(build, trained_path)
    results, kept = build / "results", build / "reduced"
    results.mkdir(parents=True, exist_ok=True)
    canvas = Asked.make(data, trained.tokenizer, single=False)
    single = Asked.make(data, trained.tokenizer, single=True).only(("name",), SINGLES)
    shown = reduce.full(canvas.scenes, kept / "canvas")
    (results / "questions.json").write_text(
        json.dumps(
            [
                [of, i, q.kind, q.answer]
                for of, a in (("canvas", canvas), ("single", single))
                for i, qs in enumerate(a.questions)
                for q in qs
            ]
        )
    )

    def run(name: str, make: Callable[[], list[Any]]) -> None:
        path = results / f"{name}.json"
        if any(part in name for part in only.split(",")) and not path.exists():
            try:
                path.write_text(json.dumps(make()))
                print(name, flush=True)
            except BudgetError as error:  # ToMe removes at most half in one block
                print(f"{name} left out: {error}", flush=True)

    tabled = canvas.only(REDUCED, ASKED)
    few = canvas.only(REDUCED, CHECKED)

    def ask(reduced: Callable[[], Reduced], of: Asked = tabled) -> Callable[[], list[Any]]:
        return lambda: flat(of, answers(trained, reduced(), of))

    def between(method: str, k: int) -> Callable[[], Reduced]:
        return lambda: chosen_between(trained, shown.first(len(tabled.scenes)), method, k)

    def in_tower(method: str, k: int) -> Callable[[], Reduced]:
        return lambda: reduce.tower(canvas.scenes, method, k, kept / "canvas")

    def small(grid: int) -> Callable[[], Reduced]:
        return lambda: reduce.smaller(canvas.scenes, grid, kept / "canvas")

    def alone() -> Reduced:
        return reduce.full(single.scenes, kept / "single")

    def within(method: str | None, k: int, of: Asked = tabled, layer: int = reduce.LAYER) -> Callable[[], list[Any]]:
        return lambda: inside(trained, shown.first(len(of.scenes)), of, method, k, layer)

    run("full", ask(lambda: shown, canvas))
    run("swapped", ask(lambda: swapped(shown), canvas))
    run("check", within(None, 0, few))
    run("check-divprune-28", within("divprune", 28, few, 0))
    for k in reduce.TOKENS + reduce.EVEN:
        for method in reduce.BETWEEN[k]:  # m3 makes other tokens than those there are, so that its answers are single prefills
            run(f"between-{method}-{k}", within(method, k, layer=0) if method == "m3" else ask(between(method, k)))
        for method in reduce.TOWER[k]:
            run(f"tower-{method}-{k}", ask(in_tower(method, k)))
        for method in reduce.INSIDE.get(k, ()):
            run(f"inside-{method}-{k}", within(method, k))
        for method in reduce.STEPWISE.get(k, ()):
            run(f"stepwise-{method}-{k}", within(method, k))
    for grid in reduce.SMALLER:
        run(f"smaller-input-{grid * grid}", ask(small(grid)))
    run("single-full", ask(alone, single))
    run("single-swapped", ask(lambda: swapped(alone()), single))
