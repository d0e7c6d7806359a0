"""PiToMe, one sample: keys: (H, n, d), x: (n, D), size: (n,) without the class token."""

import math

from tests.reference.common import head_mean, largest, merged, ranked, unit


def elu(value, alpha):
    return value if value > 0 else alpha * (math.exp(value) - 1)


def pitome(keys, x, size, r, margin, alpha, variant):
    """Returns positions of the new tokens, their values and their sizes; variant "P" (protect) or "B" (all by rank)."""
    metric = [unit(row) for row in head_mean(keys)]
    n = len(metric)
    energy = [sum(elu(float(metric[i] @ metric[j]) - margin, alpha) for j in range(n)) / n for i in range(n)]
    order = ranked(energy)
    pool = order[: 2 * r] if variant == "P" else order
    a, b = pool[0::2], pool[1::2]
    scores = [[float(metric[i] @ metric[j]) for j in b] for i in a]
    if variant == "P":
        sources, kept = list(range(len(a))), order[2 * r :]
    else:
        best = ranked([max(row) for row in scores])
        sources, kept = best[:r], [a[i] for i in best[r:]]
    groups = {i: [i] for i in [*kept, *b]}
    for s in sources:
        groups[b[largest(scores[s])]].append(a[s])
    rows, sizes = merged(x, size, list(groups.values()))
    return list(groups), rows, sizes
