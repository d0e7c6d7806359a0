"""What a family of test models is, and the helpers its builders share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

# float buffers that training changes; every other float buffer (rope, masks, coordinates) is a constant of the model
_LEARNED_BUFFERS = ("running_mean", "running_var")

# parts of the names of position tables and relative biases: added to tokens or attention scores, not multiplied
_TABLES = ("pos_", "position", "bias", "rel_")


@dataclass(frozen=True)
class Family:
    """One kind of model: `build(batch)` gives (model in eval mode, args, kwargs), the same weights at every call.

    `library` is "timm", "transformers", "torchvision" or "torch"; `depth` counts the blocks of all stages and towers
    that see the image (a decoder behind a vision tower adds its own).
    """

    name: str
    build: Callable[[int], tuple[nn.Module, tuple, dict]]
    library: str
    depth: int
    note: str = ""


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs the block from a fixed random state and leaves the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def noise(batch: int, *shape: int) -> torch.Tensor:
    """Normal noise [batch, *shape] whose sample i is the same for every batch size."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(batch)])


def tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Token ids [batch, length], drawn from 1 to vocabulary - 2 (the ends are often special tokens)."""
    draws = [torch.Generator().manual_seed(i) for i in range(batch)]
    return torch.stack([torch.randint(1, vocabulary - 1, (length,), generator=draw) for draw in draws])


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every learned value, in place, so that no zero table, tiny LayerScale or fresh weight hides a mistake.

    Weights get the scale 1 / sqrt(inputs), so that attention is far from uniform; tables get the scale of the tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        learned = isinstance(value, nn.Parameter) or name.endswith(_LEARNED_BUFFERS)
        if not value.is_floating_point() or not learned or not value.numel():
            continue
        normal = torch.randn(value.shape, generator=draw)
        size, constant = value.abs().max(), value.numel() == 1 or bool((value == value.flatten()[0]).all())
        if constant and 0 < size <= 0.1:  # LayerScale
            value.copy_(0.3 + 0.7 * torch.rand(value.shape, generator=draw))
        elif name.endswith("running_var") or (constant and size > 0):  # variances, gains, temperatures: keep the sign
            value.mul_((0.15 * normal).exp())
        else:
            if value.ndim < 2:
                step = 0.2
            elif value.shape[0] == 1 or any(part in name for part in _TABLES):
                step = 0.5
            else:
                step = 1.2 / value[0].numel() ** 0.5
            value.add_(normal * max(step, 0.2 * float(value.std(correction=0))))
    return model
