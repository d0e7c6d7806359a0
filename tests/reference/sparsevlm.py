"""SparseVLM, one sample: attention: (H, T, n) of the text after the image, embeds: (N, D), text: (T, D), x: (n, D)."""

import math

import numpy as np

from tests.reference.clusters import density_peaks
from tests.reference.common import ranked


def raters(embeds, text):
    """The text tokens that get more than the mean share of the image tokens."""
    share = np.zeros(len(text))
    for row in np.asarray(embeds, dtype=np.float64):
        weight = [math.exp(float(row @ word)) for word in np.asarray(text, dtype=np.float64)]
        share += np.array(weight) / sum(weight) / len(embeds)
    return [t for t in range(len(text)) if share[t] > share.mean()]


def sparsevlm(attention, rows, x, count, recycle, per_cluster):
    """Returns the positions of the new tokens, the kept ones ascending before the centres, and the recycled rows."""
    n = len(x)
    score = [sum(float(head[t][j]) for head in attention for t in rows) for j in range(n)]
    order = ranked(score)
    kept, dropped = sorted(order[:count]), order[count:]
    if not recycle or not dropped:
        return kept, []
    again = dropped[: int(recycle * len(dropped)) + 1]
    clusters = min(len(again), int(len(again) / per_cluster) + 1)
    wide = np.asarray(x, dtype=np.float64)
    centres, groups = density_peaks(wide[again], clusters, clusters)
    return kept + [again[c] for c in centres], [wide[[again[j] for j in group]].mean(0) for group in groups]
