"""Training in three stages: the projector alone, then everything on 64 pooled tokens, then on all 256.

    python -m benchmarks.tiny_vlm train --data ../shared/data

Several questions about one scene go through the model at once: each sees the patches and itself. It continues from its
last checkpoint where there is one; the same seed gives the same scenes, questions and order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_vlm import model as parts
from benchmarks.tiny_vlm.data import GRID, WORDS, Question, Scene, cover, questions
from benchmarks.tiny_vlm.tower import shard_path, shard_scenes

IGNORED = -100
COARSE = GRID // 2


@dataclass
class Settings:
    """steps: per stage. rate, projector_rate: of the updates and of the projector in stages 1 and 2, first_rate: of the
    projector in stage 0. horizon: the steps in which the rate would reach a twentieth; stage 2 falls there from where stage
    1 left it. batch: scenes a step. newline: weight of an answer's last token."""

    seed: int = 0
    steps: tuple[int, int, int] = (700, 500, 220)
    horizon: int = 1420
    batch: int = 4
    shards: int = 12
    rate: float = 2e-3
    projector_rate: float = 5e-4
    first_rate: float = 1e-3
    newline: float = 0.2


@dataclass
class Example:
    """scene: with its features (256, 384)."""

    scene: Scene
    features: Tensor


@dataclass
class Pack:
    """ids, positions, targets: (B, T) of the text; target IGNORED where nothing is learnt. seen: (B, 1, P + N + T, P + N + T),
    True where attention may go. place: (B, T), the number of the question that a token belongs to, -1 for padding."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    seen: Tensor
    place: Tensor


def pooled(features: Tensor) -> Tensor:
    """(B, 256, D) -> (B, 64, D), means of 2 x 2."""
    b, _, d = features.shape
    return features.view(b, COARSE, 2, COARSE, 2, d).mean((2, 4)).reshape(b, COARSE * COARSE, d)


def cells_of(count: int) -> Tensor:
    """The cell of the fine grid in which each of `count` tokens has its position; a pooled one that of its first patch."""
    if count == GRID * GRID:
        return torch.arange(count)
    rows = torch.arange(COARSE)
    return (rows[:, None] * 2 * GRID + rows[None] * 2).flatten()


def visual(projector: parts.Projector, features: Tensor) -> Tensor:
    """The embeddings of 256 or of 64 pooled tokens."""
    cells = cells_of(features.shape[1])
    if features.shape[1] == GRID * GRID:
        return projector(features, cells)
    step = cells + GRID + 1  # the middle of the four places
    return projector.shown(features) + 0.5 * (
        projector.rows[cells // GRID] + projector.rows[step // GRID] + projector.columns[cells % GRID] + projector.columns[step % GRID]
    )


def encode(tokenizer: Any, asked: list[Question]) -> list[tuple[list[int], int]]:
    """Ids of question, answer and newline, and how many of them are the question."""
    made = []
    for q in asked:
        text = tokenizer(f"\n{q.text}", add_special_tokens=False).input_ids
        made.append((text + tokenizer(f" {q.answer}\n", add_special_tokens=False).input_ids, len(text)))
    return made


def pack(encoded: list[list[tuple[list[int], int]]], visual_tokens: int) -> Pack:
    """Text of all scenes, padded to one length."""
    head = parts.PREFIX + visual_tokens
    length = max(sum(len(ids) for ids, _ in scene) for scene in encoded)
    ids, positions, targets = (torch.zeros(len(encoded), length, dtype=torch.long) for _ in range(3))
    place = torch.full((len(encoded), length), -1)
    targets += IGNORED
    for row, scene in enumerate(encoded):
        at = 0
        for number, (tokens, asked) in enumerate(scene):
            stop = at + len(tokens)
            ids[row, at:stop] = torch.tensor(tokens)
            positions[row, at:stop] = torch.arange(len(tokens)) + parts.PREFIX + GRID * GRID
            place[row, at:stop] = number
            targets[row, at + asked - 1 : stop - 1] = torch.tensor(tokens[asked:])
            at = stop
    owner = torch.cat([torch.full((len(encoded), head), -2), place], 1)
    order = torch.arange(head + length)
    same = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == -2)
    seen = same & (order[:, None] >= order[None])
    return Pack(ids, positions, targets, seen[:, None], place)


def plain_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
    """Three plain matrix products, faster here than the fused form with a mask; q: (B, H, N, D), k and v have fewer heads."""
    b, h, n, d = q.shape
    groups = h // k.shape[1]
    q = (q * scaling).reshape(b, k.shape[1], groups * n, d)
    scores = (q @ k.transpose(-1, -2)).view(b, h, n, -1) + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(b, k.shape[1], groups * n, -1)
    return (weights @ v).view(b, h, n, d).transpose(1, 2), None


class Learner:
    """The language model with its updates, and the projector."""

    def __init__(self, folder: Path, seed: int):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        torch.manual_seed(seed)
        ALL_ATTENTION_FUNCTIONS.register("tiny_plain", plain_attention)
        self.lm = parts.language_model(folder, torch.bfloat16)
        self.lm.config._attn_implementation = "tiny_plain"
        self.updates = parts.add_low_rank(self.lm)
        self.projector = parts.Projector()
        self.tokenizer = parts.tokenizer(folder)
        self._start_from_words()

    def word(self, text: str) -> Tensor:
        """(D,): the mean input embedding of a word."""
        return self.lm.model.embed_tokens.weight[self.tokenizer(f" {text}", add_special_tokens=False).input_ids].float().mean(0)

    def _start_from_words(self) -> None:
        """Places start as the words for them, the size of what is shown as that of a word."""
        with torch.no_grad():
            names = torch.stack([self.word(w) for w in WORDS])
            self.projector.gain *= names.pow(2).mean().sqrt()
            half = GRID // 2
            for table, words in ((self.projector.rows, ("top", "bottom")), (self.projector.columns, ("left", "right"))):
                table[:half], table[half:] = 0.6 * self.word(words[0]), 0.6 * self.word(words[1])

    def parameters(self) -> list[nn.Parameter]:
        return [*self.projector.parameters(), *(p for u in self.updates.values() for p in u.parameters())]

    def hidden(self, features: Tensor, text: Pack) -> Tensor:
        """features: (B, N, 384) -> the last hidden states of the text, (B, T, D)."""
        embed = self.lm.model.embed_tokens
        shown = visual(self.projector, features.float()).bfloat16()
        b, n, _ = shown.shape
        first = embed(torch.full((b, 1), parts.START))
        where = (cells_of(n) + parts.PREFIX)[None].expand(b, -1)
        if n < GRID * GRID:
            where = where + COARSE  # near the middle of the four positions
        positions = torch.cat([torch.zeros(b, 1, dtype=torch.long), where, text.positions], 1)
        mask = torch.zeros(text.seen.shape, dtype=torch.bfloat16).masked_fill(~text.seen, -1e4)
        out = self.lm.model(
            inputs_embeds=torch.cat([first, shown, embed(text.ids)], 1), position_ids=positions, attention_mask=mask, use_cache=False
        )
        return out.last_hidden_state[:, parts.PREFIX + n :]

    def loss(self, features: Tensor, text: Pack, newline: float) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss; and the loss and whether it was right of each answer token, in the order of `text.targets`."""
        wanted = text.targets != IGNORED
        targets = text.targets[wanted]
        logits = self.lm.lm_head(self.hidden(features, text)[wanted]).float()
        each = F.cross_entropy(logits, targets, reduction="none")
        last = torch.roll(text.place, -1, 1) != text.place  # the token after the last target belongs to the next question
        ends = torch.roll(last, -1, 1)[wanted]
        share = torch.where(ends, newline, 1.0)
        return (each * share).sum() / share.sum(), each.detach(), logits.argmax(-1) == targets


def examples(data: Path, folder: Path, part: str, shards: int, seed: int) -> list[Example]:
    made = []
    for shard in range(shards):
        kept = torch.load(shard_path(folder, part, shard))
        made += [Example(s, f) for s, f in zip(shard_scenes(data, part, shard, seed), kept)]
    for e in made:
        object.__setattr__(e.scene, "pixels", np.zeros(0))  # only the features are needed from here on
    return made


def stage0(learner: Learner, pool: list[Example], watched: list[Example], settings: Settings, log: Any) -> None:
    """Each patch is to look like the word for the thing it shows, or like "nothing"."""
    words = torch.stack([learner.word(w) for w in (*WORDS, "nothing")])
    middle = words.mean(0)
    directions = F.normalize(words - middle, dim=-1)
    net = [p for n, p in learner.projector.named_parameters() if n.startswith(("norm", "up", "down"))]
    optimiser = torch.optim.AdamW(net, lr=settings.first_rate, weight_decay=0.05)
    rng = np.random.default_rng([settings.seed, 10])
    features, targets = patches(pool, rng)
    held_features, held = patches(watched, rng)
    right: list[float] = []
    for step in range(settings.steps[0]):
        picked = torch.from_numpy(rng.integers(len(targets), size=1024))
        target = targets[picked]
        shown = learner.projector.shown(features[picked].float())
        logits = 15 * F.normalize(shown - middle, dim=-1) @ directions.T
        loss = F.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = settings.first_rate * (1 - step / settings.steps[0])
        things = target < len(WORDS)
        right.append(float((logits.argmax(-1) == target)[things].float().mean()))
        if step % 100 == 99:
            shown = learner.projector.eval().shown(held_features.float()).detach()
            learner.projector.train()
            held_right = (F.normalize(shown - middle, dim=-1) @ directions.T).argmax(-1) == held
            watched_right = held_right[held < len(WORDS)].float().mean().item()
            log(stage=0, step=step + 1, loss=loss.item(), right=float(np.mean(right[-100:])), watched=watched_right)


def patches(pool: list[Example], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features (M, 384) of single and pooled patches, and what each shows, (M,): things, and about as many with nothing."""
    features, targets = [], []
    for e in pool:
        for grid, values in ((GRID, e.features), (COARSE, pooled(e.features[None])[0])):
            word, share = cover(e.scene.things, grid)
            thing, nothing = (np.flatnonzero(w) for w in (share > 0.4, share < 0.05))
            thing = rng.permutation(thing)[:32]
            nothing = rng.permutation(nothing)[: len(thing) // 2]
            features.append(values[np.concatenate([thing, nothing])])
            targets.append(np.concatenate([word[thing], np.full(len(nothing), len(WORDS))]))
    return torch.cat(features), torch.from_numpy(np.concatenate(targets))


def batches(pool: list[Example], settings: Settings, stage: int, start: int) -> Iterator[tuple[list[Example], list[list[Question]]]]:
    """The scenes and questions of each step from `start` on; what a step gets does not depend on where one starts."""
    order = np.random.default_rng([settings.seed, 20 + stage])
    needed = settings.steps[stage] * settings.batch
    picked = np.concatenate([order.permutation(len(pool)) for _ in range(-(-needed // len(pool)))])[:needed]
    for step in range(start, settings.steps[stage]):
        rng = np.random.default_rng([settings.seed, 30 + stage, step])
        chosen = [pool[i] for i in picked[step * settings.batch : (step + 1) * settings.batch]]
        yield chosen, [questions(e.scene, rng) for e in chosen]


def stage12(learner: Learner, pool: list[Example], watched: list[Example], settings: Settings, folder: Path, log: Any) -> None:
    """Stage 1 on 64 pooled tokens, stage 2 on all 256; the rate falls over both."""
    nets = [list(learner.projector.parameters()), [p for u in learner.updates.values() for p in u.parameters()]]
    groups = [dict(params=nets[0], lr=settings.projector_rate), dict(params=nets[1], lr=settings.rate)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = folder / "checkpoint.pt"
    begin = (1, 0)
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        begin = kept["next"]
        restore(learner, kept["trained"])
        optimiser.load_state_dict(kept["optimiser"])
    for stage in range(begin[0], 3):
        first = begin[1] if stage == begin[0] else 0
        scores: dict[str, list[float]] = {}
        since = time.perf_counter()
        for step, (chosen, asked) in enumerate(batches(pool, settings, stage, first), first):
            for group, rate in zip(optimiser.param_groups, (settings.projector_rate, settings.rate)):
                group["lr"] = rate * share_of_rate(stage, step, settings)
            features = torch.stack([e.features for e in chosen]).float()
            text = pack([encode(learner.tokenizer, a) for a in asked], 64 if stage == 1 else 256)
            loss, each, right = learner.loss(pooled(features) if stage == 1 else features, text, settings.newline)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            for kind, value in by_kind(text, asked, right).items():
                scores.setdefault(kind, []).extend(value)
            if (step + 1) % 20 == 0:
                seconds = (time.perf_counter() - since) / 20
                log(stage=stage, step=step + 1, loss=loss.item(), seconds=seconds, right={k: np.mean(v) for k, v in scores.items()})
                scores, since = {}, time.perf_counter()
            if (step + 1) % 100 == 0 or step + 1 == settings.steps[stage]:
                log(stage=stage, step=step + 1, watched=watch(learner, watched, stage))
                since = time.perf_counter()
            if (step + 1) % 50 == 0 or step + 1 == settings.steps[stage]:
                following = (stage, step + 1) if step + 1 < settings.steps[stage] else (stage + 1, 0)
                trained = parts.trained_state(learner.projector, learner.updates)
                torch.save(dict(next=following, trained=trained, optimiser=optimiser.state_dict()), checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)


def share_of_rate(stage: int, step: int, settings: Settings) -> float:
    if stage == 1:
        return min(1, (step + 1) / 20) * (1 - 0.95 * step / settings.horizon)
    reached = 1 - 0.95 * settings.steps[1] / settings.horizon
    return reached + (0.05 - reached) * step / settings.steps[2]


def restore(learner: Learner, trained: Mapping[str, Tensor]) -> None:
    learner.projector.load_state_dict({k.removeprefix("projector."): v for k, v in trained.items() if k.startswith("projector.")})
    with torch.no_grad():
        for name, update in learner.updates.items():
            update.a.copy_(trained[f"{name}.a"])
            update.b.copy_(trained[f"{name}.b"])


def by_kind(text: Pack, asked: list[list[Question]], right: Tensor) -> dict[str, list[float]]:
    """Whether each whole answer was right, newline included."""
    wanted = text.targets != IGNORED
    rows = torch.arange(len(asked))[:, None].expand_as(text.place)[wanted].tolist()
    scores: dict[tuple[int, int], bool] = {}
    for row, number, good in zip(rows, text.place[wanted].tolist(), right.tolist()):
        scores[row, number] = scores.get((row, number), True) and good
    made: dict[str, list[float]] = {}
    for (row, number), good in scores.items():
        made.setdefault(asked[row][number].kind, []).append(float(good))
    return made


@torch.no_grad()
def watch(learner: Learner, watched: list[Example], stage: int, count: int = 64) -> dict[str, float]:
    """Exact match by kind on scenes of held-out pictures, at the number of tokens that the stage trains."""
    scores: dict[str, list[float]] = {}
    learner.projector.eval()
    for at in range(0, min(count, len(watched)), 8):
        chosen = watched[at : at + 8]
        asked = [questions(e.scene, np.random.default_rng(at + i), training=False) for i, e in enumerate(chosen)]
        features = torch.stack([e.features for e in chosen]).float()
        text = pack([encode(learner.tokenizer, a) for a in asked], 64 if stage == 1 else 256)
        _, _, right = learner.loss(pooled(features) if stage == 1 else features, text, 1.0)
        for kind, value in by_kind(text, asked, right).items():
            scores.setdefault(kind, []).extend(value)
    learner.projector.train()
    return {k: float(np.mean(v)) for k, v in scores.items()}


def train(data: Path, build: Path, settings: Settings) -> None:
    """Trains, and writes what was trained to build/trained.safetensors in half precision."""
    build.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def log(**values: Any) -> None:
        line = json.dumps({"seconds_since": round(time.time() - started), **values}, default=lambda v: round(float(v), 3))
        print(line, flush=True)
        with (build / "train.jsonl").open("a") as file:
            file.write(line + "\n")

    learner = Learner(build / "llm", settings.seed)
    pool = examples(data, build / "features", "train", settings.shards, settings.seed)
    watched = examples(data, build / "features", "watch", 1, settings.seed)
    watched = watched[:12] + watched[-52:]  # single pictures stand first
    if not (build / "checkpoint.pt").exists():
        stage0(learner, pool, watched, settings, log)
    stage12(learner, pool, watched, settings, build, log)
    state = {k: v.half() for k, v in parts.trained_state(learner.projector, learner.updates).items()}
    parts.save_file(state, build / "trained.safetensors")
