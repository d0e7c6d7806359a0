"""DART without text pivots, one sample: keys: (H, n, d), hidden: (n, D) after the final norm."""

import math

import numpy as np

from tests.reference.common import ranked, unit


def dart(keys, hidden, k, pivots):
    """Returns the kept positions, ascending."""
    n = len(hidden)
    norm = [sum(abs(float(v)) for head in keys for v in head[j]) for j in range(n)]
    chosen = ranked(norm)[: min(pivots, k)]
    rows = [unit(row) for row in np.asarray(hidden)]
    kept, remaining = list(chosen), k - len(chosen)
    for turn, pivot in enumerate(chosen):
        quota = math.ceil(remaining / (len(chosen) - turn))
        free = [j for j in range(n) if j not in kept]
        unlike = ranked([-float(rows[pivot] @ rows[j]) for j in free])
        kept += [free[j] for j in unlike[:quota]]
        remaining -= quota
    return sorted(kept)
