"""Whole vision-language models: in parts, each of which is optimized by itself, and as files that run."""

from tokcompile.vlm.export import export
from tokcompile.vlm.folder import load
from tokcompile.vlm.generate import Generator
from tokcompile.vlm.image import Patches, Preprocess
from tokcompile.vlm.split import Part, Parts, split
from tokcompile.vlm.vision import export_vision
from tokcompile.vlm.whole import export_whole

__all__ = ["Generator", "Part", "Parts", "Patches", "Preprocess", "export", "export_vision", "export_whole", "load", "split"]
