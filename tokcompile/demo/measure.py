"""Running the ONNX files: latency in alternating pairs, and how far saliency and class token move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tokcompile.demo import weights
from tokcompile.demo.weights import PATCH, SIZE, WHOLE, WIDTH
from tokcompile.errors import TokcompileError
from tokcompile.timing import Ratio, paired

Array = np.ndarray[Any, Any]
DEPTH = 12


@dataclass(frozen=True)
class Output:
    """saliency: (224, 224) in 0..1, upsampled where the model ran on a smaller input; cls: (384,)."""

    saliency: Array
    cls: Array


@dataclass(frozen=True)
class Quality:
    """Against the original. error: mean absolute difference of saliency inside the photograph; worst: the largest."""

    error: float
    worst: float
    cosine: float


class Session:
    """One ONNX file in onnxruntime with one thread, and the input size it takes."""

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ImportError as error:
            raise TokcompileError(f"the demo needs onnxruntime ({error}): pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = self.session.get_inputs()
        self.name, self.size = entry.name, (int(entry.shape[-2]), int(entry.shape[-1]))

    def outputs(self, image: Any) -> Output:
        """What the model says about an image."""
        saliency, cls, _ = self.session.run(None, self.feed(image))
        whole = torch.from_numpy(saliency)
        if self.size != WHOLE:
            whole = F.interpolate(whole, size=WHOLE, mode="bilinear", align_corners=False)
        return Output(whole[0, 0].numpy(), cls[0])

    def feed(self, image: Any) -> dict[str, Array]:
        return {self.name: shrunk(weights.preprocess(image), self.size).numpy()}

    def runner(self, image: Any) -> Callable[[], Any]:
        """A call without arguments that runs the model once, without the preparation of the image."""
        feed = self.feed(image)
        return lambda: self.session.run(None, feed)


def quality(output: Output, original: Output, image: Any) -> Quality:
    """Compares inside the photograph only: what the model says about the bars beside it is not stable."""
    box = weights.content_box(image.height, image.width)
    difference = np.abs(output.saliency[box] - original.saliency[box])
    norms = np.linalg.norm(output.cls) * np.linalg.norm(original.cls)
    return Quality(float(difference.mean()), float(difference.max()), float(output.cls @ original.cls / norms))


def latency(original: Session, other: Session, image: Any, pairs: int) -> Ratio:
    """CPU time of the other model over that of the original, run alternately."""
    return paired(original.runner(image), other.runner(image), pairs, warmup=1)


def shrunk(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """image: (1, 3, 224, 224), whole and with fewer pixels."""
    return image if size == WHOLE else F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)


def flops_at(size: tuple[int, int]) -> int:
    """FLOPs of the demo model at an input size, two per multiplication and addition."""
    patches = size[0] * size[1] // PATCH**2
    tokens = patches + 1
    blocks = DEPTH * (2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH)
    embedding = 2 * patches * 3 * PATCH**2 * WIDTH
    head = 2 * patches * 16 * (WIDTH * 256 + 4 * 256 * 128 + 16 * 128 * 64) + 2 * 64 * patches * 64
    return blocks + embedding + head


def smaller_size(budget: float) -> tuple[int, int]:
    """The input size, at most one patch wider than high, whose FLOPs come closest to this share of those at 224 px."""
    sizes = [(side, side + more) for side in range(2 * PATCH, SIZE, PATCH) for more in (0, PATCH)]
    return min(sizes, key=lambda size: abs(flops_at(size) / flops_at(WHOLE) - budget))
