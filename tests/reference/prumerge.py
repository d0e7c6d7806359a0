"""PruMerge+ with a fixed number of tokens, one sample: q, k: (H, L, d) of the whole sequence, x: (n, D) from `start` on."""

import math

import numpy as np

from tests.reference.common import ranked, unit


def wide(heads):
    """(H, L, d) -> (L, H * d)."""
    return np.concatenate([np.asarray(head, dtype=np.float64) for head in heads], axis=-1)


def softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def prumerge(q, k, x, start, class_token, top, even, neighbours):
    """Returns the positions of the new tokens and their values; `even` of them are spread evenly."""
    q, k, x = wide(q), wide(k), np.asarray(x, dtype=np.float64)
    n, width = len(x), k.shape[-1]
    rows = [softmax([float(query @ key) / math.sqrt(width) for key in k]) for query in (q[:1] if class_token else q)]
    weight = [sum(row[start + j] for row in rows) / len(rows) for j in range(n)]
    step = n // even if even else 0
    grid = [step // 2 + i * step for i in range(even)]
    free = [j for j in ranked(weight) if j not in grid]
    kept = free[:top] + grid
    metric = [unit(k[start + j]) for j in range(n)]
    new = []
    for i in kept:
        others = [j for j in range(n) if j != i]
        order = ranked([float(metric[i] @ metric[j]) for j in others])
        new.append(x[i] + sum(weight[others[o]] * x[others[o]] for o in order[:neighbours]))
    new.append(sum(weight[j] * x[j] for j in range(n) if j not in kept))
    return [*kept, free[top]], np.stack(new)
