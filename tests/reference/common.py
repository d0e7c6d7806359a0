"""What the loops share: ranking with ties to the lower index, cosine, and the size-weighted mean."""

import math

import numpy as np


def ranked(score):
    """Positions from the largest score to the smallest, the lower position first among equals."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def largest(score):
    """Position of the largest score, the lowest among equals."""
    return ranked(score)[0]


def unit(row):
    length = math.sqrt(sum(float(v) * float(v) for v in row))
    return np.array([float(v) / max(length, 1e-12) for v in row])


def head_mean(keys):
    """keys: (H, L, d) -> (L, d)."""
    return sum(np.asarray(head, dtype=np.float64) for head in keys) / len(keys)


def merged(x, size, groups):
    """One token and size for each group of positions: x: (L, D), size: (L,)."""
    rows, sizes = [], []
    for group in groups:
        total = sum(float(size[i]) for i in group)
        rows.append(sum(np.asarray(x[i], dtype=np.float64) * float(size[i]) for i in group) / total)
        sizes.append(total)
    return np.stack(rows), np.array(sizes)
