"""The vision tower, and its features of many scenes kept on disk, since it is not trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tiny_vlm.data import Scene, read_pictures, scene
from tokcompile.demo import weights

SHARD = 250
SINGLES = 0.15  # the share of single pictures among the scenes of a shard


class Tower(nn.Module):
    """pixels: (B, 3, 224, 224) -> the features after the final norm, (B, 257, 384), class token first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = weights.load_saliency_vit().backbone
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels).last_hidden_state


def pixels_of(scenes: list[Scene]) -> Tensor:
    """(B, 3, 224, 224), normalised."""
    pixels = np.stack([s.pixels for s in scenes]).astype(np.float32) / 255
    normalised = (pixels - np.array(weights.MEAN, np.float32)) / np.array(weights.STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))


def shard_scenes(data: Path, part: str, shard: int, seed: int) -> list[Scene]:
    """The scenes of one shard, single pictures first."""
    pictures = read_pictures(data, part)
    singles = round(SHARD * SINGLES)
    numbers = range(shard * SHARD, (shard + 1) * SHARD)
    return [scene(pictures, part, n, single=i < singles, seed=seed) for i, n in enumerate(numbers)]


@torch.no_grad()
def features(tower: nn.Module, scenes: list[Scene], batch: int = 10) -> Tensor:
    """(B, 256, 384) in bfloat16: the patch features, computed with bfloat16 matrix products."""
    made = []
    for at in range(0, len(scenes), batch):
        with torch.autocast("cpu", torch.bfloat16):
            made.append(tower(pixels_of(scenes[at : at + batch]))[:, 1:].bfloat16())
    return torch.cat(made)


def prepare(data: Path, folder: Path, part: str, shards: range, seed: int) -> None:
    """Writes the features of shards that are not there yet."""
    tower = Tower()
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = shard_path(folder, part, shard)
        if not path.exists():
            made = features(tower, shard_scenes(data, part, shard, seed))
            temporary = path.with_suffix(".tmp")
            torch.save(made, temporary)
            temporary.rename(path)
            print(path, flush=True)


def shard_path(folder: Path, part: str, shard: int) -> Path:
    return folder / f"{part}-{shard:03}.pt"
