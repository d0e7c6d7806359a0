"""EVS: of a video, the patches that changed since the frame before (Bagrov et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokcompile.errors import MethodError
from tokcompile.primitives import identity, keep_best, unit
from tokcompile.recipe import Keep, Recipe, Site, Tokens, anywhere, register_method
from tokcompile.steps import last_block


def frame_count(site: Site) -> int:
    """How many frames the tokens are: the option, else the first axis of a grid of three."""
    frames = site.options["frames"]
    if frames is None and site.grid is not None and len(site.grid) == 3:
        frames = site.grid[0]
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or site.n % frames:
        raise MethodError(
            f"evs compares the frames of a video, and nothing says how many these {site.n} tokens are: frames=..., which "
            f"divides their number (not {frames!r})"
        )
    if site.k < site.n // frames:
        raise MethodError(f"evs always keeps the first frame: of {frames} frames with {site.n} tokens no fewer than "
                          f"{site.n // frames} can be left, not {site.k}")  # fmt: skip
    return frames


def least(n: int, options: Mapping[str, Any]) -> int:
    frames = options["frames"]
    return n // frames if isinstance(frames, int) and frames > 0 else 1


def plan(tokens: Tokens, site: Site) -> Keep:
    """The whole first frame, and the tokens least like the one at their place in the frame before (cosine)."""
    frames = frame_count(site)
    if site.k == site.n:
        return Keep(identity(tokens.x))
    rows = unit(tokens.x).unflatten(1, (frames, site.n // frames))
    change = 1 - (rows[:, 1:] * rows[:, :-1]).sum(-1)
    first = torch.full_like(rows[:, :1, :, 0], 255.0)  # no cosine distance is above 2
    return Keep(keep_best(torch.cat([first, change], 1).flatten(1), site.k))


EVS = register_method(
    Recipe(
        "evs",
        plan,
        place="block",
        steps=last_block(language=0),
        options={"frames": None},
        least=least,
        together=anywhere,
        paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, arXiv 2510.14624",
    )
)
