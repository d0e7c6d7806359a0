"""Training in stages: the projector alone, then everything on 64 pooled tokens, then on all 256, at last with counting first.

    python -m benchmarks.tiny_vlm train --data ../shared/data

Several questions about one scene go through the model at once: each sees the patches and itself. It continues from its
last checkpoint where there is one; the same seed gives the same scenes, questions and order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_vlm import model as parts
from benchmarks.tiny_vlm.data import GRID, WORDS, Question, Scene, cover, questions
from benchmarks.tiny_vlm.learner import COARSE, Learner, pooled
from benchmarks.tiny_vlm.packing import by_kind, encode, pack, weights
from benchmarks.tiny_vlm.tower import shard_path, shard_scenes


@dataclass
class Settings:
    """steps: per stage. rate, projector_rate: of the updates and of the projector in stages 1 to 3, first_rate: of the
    projector in stage 0. falls: to which share of these the rate falls in each stage. batch: scenes a step. newline: weight
    of an answer's last token. counted, counting: per stage, see `questions` and `weights`."""

    seed: int = 0
    steps: tuple[int, ...] = (700, 800, 100, 300)
    falls: tuple[float, ...] = (0.0, 0.465, 0.326, 0.05)
    batch: int = 4
    shards: int = 16
    rate: float = 2e-3
    projector_rate: float = 5e-4
    first_rate: float = 1e-3
    newline: float = 0.2
    counted: tuple[int, ...] = (0, 2, 2, 1)
    counting: tuple[float, ...] = (0.0, 1.0, 1.0, 3.0)


@dataclass
class Example:
    """scene: with its features (256, 384)."""

    scene: Scene
    features: Tensor


Batch = tuple[list[Example], list[list[Question]]]


def examples(data: Path, folder: Path, part: str, shards: int, seed: int) -> list[Example]:
    made = []
    for shard in range(shards):
        kept = torch.load(shard_path(folder, part, shard))
        blind = [replace(s, pixels=np.zeros(0)) for s in shard_scenes(data, part, shard, seed)]  # the features are enough
        made += [Example(s, f) for s, f in zip(blind, kept)]
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


def batches(pool: list[Example], settings: Settings, stage: int, start: int) -> Iterator[Batch]:
    """The scenes and questions of each step from `start` on; what a step gets does not depend on where one starts."""
    order = np.random.default_rng([settings.seed, 20 + stage])
    needed = settings.steps[stage] * settings.batch
    picked = np.concatenate([order.permutation(len(pool)) for _ in range(-(-needed // len(pool)))])[:needed]
    for step in range(start, settings.steps[stage]):
        rng = np.random.default_rng([settings.seed, 30 + stage, step])
        chosen = [pool[i] for i in picked[step * settings.batch : (step + 1) * settings.batch]]
        yield chosen, [questions(e.scene, rng, counted=settings.counted[stage]) for e in chosen]


def later_stages(
    learner: Learner, pool: list[Example], watched: list[Example], settings: Settings, folder: Path, log: Any
) -> None:
    """Stage 1 on 64 pooled tokens, stages 2 and 3 on all 256."""
    nets = [list(learner.projector.parameters()), [p for u in learner.updates.values() for p in u.parameters()]]
    groups = [dict(params=nets[0], lr=settings.projector_rate), dict(params=nets[1], lr=settings.rate)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = folder / "checkpoint.pt"
    begin = (1, 0)
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        begin = kept["next"]
        learner.restore(kept["trained"])
        optimiser.load_state_dict(kept["optimiser"])
    for stage in range(begin[0], len(settings.steps)):
        first = begin[1] if stage == begin[0] else 0
        scores: dict[str, list[float]] = {}
        since = time.perf_counter()
        for step, (chosen, asked) in enumerate(batches(pool, settings, stage, first), first):
            torch.manual_seed((settings.seed * 10 + stage) * 100_000 + step)  # of dropout: a continued run is the same run
            for group, rate in zip(optimiser.param_groups, (settings.projector_rate, settings.rate)):
                group["lr"] = rate * share_of_rate(stage, step, settings)
            features = torch.stack([e.features for e in chosen]).float()
            text = pack([encode(learner.tokenizer, a) for a in asked], 64 if stage == 1 else 256)
            share = weights(text, asked, settings.newline, settings.counting[stage])
            loss, right = learner.loss(pooled(features) if stage == 1 else features, text, share)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            for kind, value in by_kind(text, asked, right).items():
                scores.setdefault(kind, []).extend(value)
            if (step + 1) % 20 == 0:
                seconds = (time.perf_counter() - since) / 20
                share = {k: np.mean(v) for k, v in scores.items()}
                log(stage=stage, step=step + 1, loss=loss.item(), seconds=seconds, right=share)
                scores, since = {}, time.perf_counter()
            if (step + 1) % 100 == 0 or step + 1 == settings.steps[stage]:
                log(stage=stage, step=step + 1, watched=watch(learner, watched, stage))
                since = time.perf_counter()
            if (step + 1) % 50 == 0 or step + 1 == settings.steps[stage]:
                following = (stage, step + 1) if step + 1 < settings.steps[stage] else (stage + 1, 0)
                keep(checkpoint, learner, optimiser, following)


def keep(checkpoint: Path, learner: Learner, optimiser: torch.optim.Optimizer, following: tuple[int, int]) -> None:
    temporary = checkpoint.with_suffix(".tmp")
    trained = parts.trained_state(learner.projector, learner.updates)
    torch.save(dict(next=following, trained=trained, optimiser=optimiser.state_dict()), temporary)
    temporary.replace(checkpoint)


def share_of_rate(stage: int, step: int, settings: Settings) -> float:
    """Linear in each stage, after 20 steps of warming up in stage 1."""
    start = 1.0 if stage == 1 else settings.falls[stage - 1]
    share = start + (settings.falls[stage] - start) * step / settings.steps[stage]
    return share * min(1, (step + 1) / 20) if stage == 1 else share


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
        _, right = learner.loss(pooled(features) if stage == 1 else features, text, torch.ones(text.targets.shape))
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
    later_stages(learner, pool, watched, settings, build, log)
    state = {k: v.half() for k, v in parts.trained_state(learner.projector, learner.updates).items()}
    parts.save_file(state, build / "trained.safetensors")
