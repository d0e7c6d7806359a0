"""Clusters by density peaks, one sample: x: (n, D)."""

import math

import numpy as np

from tests.reference.common import ranked


def density_peaks(x, count, neighbours):
    """Returns the centres, best first, and for each the positions of its members, ascending. The densest token, for which
    the largest distance of all is published as the one to a denser token, has no smaller score than any other."""
    rows = np.asarray(x, dtype=np.float64)
    n = len(rows)
    far = [[math.sqrt(float(((rows[i] - rows[j]) ** 2).sum()) / rows.shape[1]) for j in range(n)] for i in range(n)]
    sparse = [sum(d * d for d in sorted(far[i])[:neighbours]) / neighbours for i in range(n)]
    score = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (sparse[j], j) < (sparse[i], i)]
        score.append(min(denser) * math.exp(-sparse[i]) if denser else math.inf)
    centres = ranked(score)[:count]
    groups = [[] for _ in centres]
    for j in range(n):
        own = centres.index(j) if j in centres else ranked([-far[c][j] for c in centres])[0]
        groups[own].append(j)
    return centres, groups
