"""Whole vision-language models: in parts, each of which is optimized by itself, and as files that run."""

from tokcompile.vlm.generate import Generator
from tokcompile.vlm.split import Part, Parts, split

__all__ = ["Generator", "Part", "Parts", "split"]
