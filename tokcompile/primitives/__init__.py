"""The few operations that methods are made of, in plain PyTorch with static shapes."""

from tokcompile.primitives.cluster import density_peaks, members
from tokcompile.primitives.combine import apply, gather_rows
from tokcompile.primitives.constant import constant
from tokcompile.primitives.forms import FORMS, Forms, current_forms, use_forms
from tokcompile.primitives.score import cosine, unit
from tokcompile.primitives.select import ascending, complement, farthest_points, first_argmax, identity, keep_best, top_k

__all__ = [
    "FORMS",
    "Forms",
    "apply",
    "ascending",
    "complement",
    "constant",
    "cosine",
    "current_forms",
    "density_peaks",
    "farthest_points",
    "first_argmax",
    "gather_rows",
    "identity",
    "keep_best",
    "members",
    "top_k",
    "unit",
    "use_forms",
]
