"""Image preprocessing by numbers: a file becomes pixel values of the one shape that a vision part takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcompile.errors import InputError

FITS = ("stretch", "crop", "pad", "aspect")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by their numbers in pillow


@dataclass(frozen=True)
class Patches:
    """Pixel values as a row of patches, each (channels, frames, size, size), in groups of merge x merge."""

    size: int
    merge: int = 1
    frames: int = 1


@dataclass(frozen=True)
class Preprocess:
    """size: (height, width) in pixels. mean, std: by channel, of values from 0 to 1. fit: "stretch" to the size; "crop": the
    short side to the size, then its middle; "pad": to a square with the mean's colour first; "aspect": stretch, but refuse
    images of another shape. patches: where a model takes patches instead of images.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fit: str = "stretch"
    resample: str = "bicubic"
    patches: Patches | None = None

    def __post_init__(self) -> None:
        if self.fit not in FITS or self.resample not in FILTERS:
            raise InputError(
                f"fit={self.fit!r}, resample={self.resample!r}: they are one of {', '.join(FITS)} and of {', '.join(FILTERS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.size) < 1 or min(self.std) <= 0:
            raise InputError("mean and std have three numbers, std no zero, and size is (height, width)")

    def __call__(self, path: str | os.PathLike[str], shape: Sequence[int]) -> Tensor:
        """The pixel values of an image file, of this shape. Raises: InputError."""
        return pixel_values([self], [path], shape)

    def values(self, path: str | os.PathLike[str]) -> Tensor:
        """Of one image file: (3, height, width), or (patches, numbers of each). Raises: InputError."""
        picture = self.fitted(opened(path), os.fspath(path))
        pixels = np.asarray(picture, dtype=np.float32) / 255
        mean, std = (np.array(numbers, dtype=np.float32) for numbers in (self.mean, self.std))
        values = torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))
        return values if self.patches is None else in_patches(values, self.patches)

    def fitted(self, picture: Any, path: str) -> Any:
        height, width = self.size
        how = FILTERS.index(self.resample)
        have = picture.width / picture.height
        if self.fit == "aspect" and abs(np.log(have * height / width)) > np.log(1.1):
            raise InputError(
                f"{path} is {picture.width} x {picture.height} pixels, and this model was made for images shaped like "
                f"{width} x {height}\n  what to do: crop it to that shape, or pass --stretch"
            )
        if self.fit == "pad":
            from PIL import Image

            side = max(picture.size)
            square = Image.new("RGB", (side, side), tuple(round(255 * m) for m in self.mean))
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        if self.fit == "crop":
            scale = max(height / picture.height, width / picture.width)
            large = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
            left, top = (large[0] - width) // 2, (large[1] - height) // 2
            return picture.resize(large, how).crop((left, top, left + width, top + height))
        return picture.resize((width, height), how)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Preprocess:
        """Raises: KeyError, TypeError, InputError."""
        patches = None if data["patches"] is None else Patches(**data["patches"])
        return Preprocess(
            (int(data["size"][0]), int(data["size"][1])), tuple(data["mean"]), tuple(data["std"]), data["fit"],
            data["resample"], patches,
        )  # fmt: skip

    @staticmethod
    def from_config(config: Mapping[str, Any], shape: Sequence[int], grid: Sequence[int] | None = None) -> Preprocess:
        """What a preprocessor_config.json says, for pixel values of this shape. grid: (frames, rows, columns) of patches.

        Raises: InputError where it does not say enough.
        """
        how = FILTERS[int(config.get("resample", 3))]
        mean, std = (tuple(float(v) for v in config.get(f"image_{name}", (0.5,) * 3)) for name in ("mean", "std"))
        if not config.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        if abs(float(config.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3 or not config.get("do_rescale", True):
            raise InputError("this preprocessing scales values otherwise than to 0 to 1: write it out as vlm.Preprocess")
        if "patch_size" in config and "merge_size" in config:
            if grid is None:
                raise InputError("patches need image_grid_thw among the example inputs, which says how they lie")
            patches = Patches(int(config["patch_size"]), int(config["merge_size"]), int(config.get("temporal_patch_size", 1)))
            size = int(grid[1]) * patches.size, int(grid[2]) * patches.size
            return Preprocess(size, mean, std, "aspect", how, patches)
        if len(shape) < 3 or shape[-3] != 3:
            raise InputError(
                f"pixel values of shape {tuple(shape)} are no image: write the preprocessing out as vlm.Preprocess"
            )
        fit = "crop" if config.get("do_center_crop") else "stretch"
        return Preprocess((int(shape[-2]), int(shape[-1])), mean, std, fit, how)


def pixel_values(
    how: Sequence[Preprocess], paths: Sequence[str | os.PathLike[str]], shape: Sequence[int], stretch: bool = False
) -> Tensor:
    """The pixel values of image files as a model takes them, of this shape: side by side, or patches in a row.

    how: one for each image of a prompt, or one for all; samples come one after the other. stretch: whatever the shape of an
    image. Raises: InputError.
    """
    how = [replace(one, fit="stretch") for one in how] if stretch else how
    each = [how[i % len(how)].values(path) for i, path in enumerate(paths)]
    patches = how[0].patches is not None
    joined = torch.cat(each) if patches else torch.stack(each)
    if not patches and math.prod(shape[:-3]) == len(each) and tuple(shape[-3:]) == tuple(joined.shape[1:]):
        return joined.reshape(tuple(shape))
    if tuple(joined.shape) != tuple(shape):
        raise InputError(
            f"{len(each)} image(s) become {'x'.join(map(str, joined.shape))}, and the vision part takes "
            f"{'x'.join(map(str, shape))}\n  what to do: pass the pixel values of all images and tiles as a .npy "
            "file (--pixels)"
        )
    return joined


def opened(path: str | os.PathLike[str]) -> Any:
    """An image file in RGB, turned as its camera says. Raises: InputError."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"reading images needs pillow: pip install pillow ({error})") from error
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the image {os.fspath(path)!r}: {error}") from error


def in_patches(image: Tensor, patches: Patches) -> Tensor:
    """(C, H, W) as (patches, C * frames * size * size), those of a merged group in a row."""
    p, m = patches.size, patches.merge
    channels, height, width = image.shape
    rows, columns = height // (p * m), width // (p * m)
    tiles = image.reshape(channels, rows, m, p, columns, m, p).permute(1, 4, 2, 5, 0, 3, 6)  # (rows, columns, m, m, C, p, p)
    tiles = tiles[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, patches.frames, -1, -1)
    return tiles.reshape(rows * columns * m * m, -1).contiguous()
