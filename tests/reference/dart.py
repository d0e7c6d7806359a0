"""DART, one sample: keys: (H, L, d), hidden: (L, D) after the final norm; the image is tokens start to start + n."""

import math

import numpy as np

from tests.reference.common import ranked, unit


def dart(keys, hidden, k, pivots, start=0, n=None, text_pivots=0):
    """Returns the kept positions within the image, ascending; text pivots come from all tokens after it."""
    n = len(hidden) - start if n is None else n
    norm = [sum(abs(float(v)) for head in keys for v in head[j]) for j in range(len(hidden))]
    kept = ranked(norm[start : start + n])[: min(pivots, k)]
    text = [start + n + j for j in ranked(norm[start + n :])[:text_pivots]]
    chosen = [*(start + j for j in kept), *text]
    rows = [unit(row) for row in np.asarray(hidden)]
    remaining = k - len(kept)
    for turn, pivot in enumerate(chosen):
        quota = math.ceil(remaining / (len(chosen) - turn))
        free = [j for j in range(n) if j not in kept]
        unlike = ranked([-float(rows[pivot] @ rows[start + j]) for j in free])
        kept += [free[j] for j in unlike[:quota]]
        remaining -= quota
    return sorted(kept)
