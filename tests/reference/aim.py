"""AIM, one sample: x: (n, D), scores: (H, L, L) before the softmax, with -inf where a token may not look."""

import math

import numpy as np

from tests.reference.common import largest, ranked, unit


def merge(x, places, removed):
    """One round: returns the new rows and the position that each has of `places`."""
    metric = [unit(row) for row in x]
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {a: largest([float(metric[a] @ metric[b]) for b in odd]) for a in even}
    order = [even[i] for i in ranked([float(metric[a] @ metric[odd[best[a]]]) for a in even])]
    rows, new = [x[a] for a in order[removed:]], [places[a] for a in order[removed:]]
    for i, b in enumerate(odd):
        group = [b, *(a for a in order[:removed] if best[a] == i)]
        rows.append(sum(x[j] for j in group) / len(group))
        new.append(places[b])
    return rows, new


def merge_to(x, k):
    rows, places = list(np.asarray(x, dtype=np.float64)), list(range(len(x)))
    while len(rows) > k:
        rows, places = merge(rows, places, min(len(rows) // 2, len(rows) - k))
    return np.stack(rows), places


def importance(scores, tau, rounds):
    """How much of an even start arrives at each token when every one passes on all it has, `rounds` times."""
    total = np.zeros(len(scores[0]))
    for head in np.asarray(scores, dtype=np.float64):
        rank = [1 / len(head)] * len(head)
        for _ in range(rounds):
            after = [0.0] * len(head)
            for q, row in enumerate(head):
                weight = [math.exp((s - max(row)) / tau) for s in row]
                for j, w in enumerate(weight):
                    after[j] += rank[q] * w / sum(weight)
            rank = after
        total += np.array(rank) ** 2
    return np.sqrt(total / len(scores))


def prune(scores, start, n, k, tau, rounds):
    """Returns the kept positions within the image, ascending."""
    return sorted(ranked(importance(scores, tau, rounds)[start : start + n].tolist())[:k])
