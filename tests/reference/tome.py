"""ToMe, one sample: keys: (H, L, d) and x: (L, D), size: (L,) of the whole sequence, `prefix` protected first."""

from tests.reference.common import head_mean, largest, merged, ranked, unit


def tome(keys, x, size, prefix, r):
    """Returns body positions of the new tokens, their values and their sizes."""
    metric = [unit(row) for row in head_mean(keys)]
    even = [i for i in range(len(metric)) if i % 2 == 0]
    odd = [i for i in range(len(metric)) if i % 2 == 1]
    best, partner = [], []
    for a in even:
        scores = [metric[a] @ metric[b] if a >= prefix and b >= prefix else float("-inf") for b in odd]
        partner.append(largest(scores) if scores else None)
        best.append(scores[partner[-1]] if scores else float("-inf"))
    order = ranked(best)
    kept = order[r:]
    if prefix:
        kept = sorted(kept)
    groups = {even[a]: [even[a]] for a in kept} | {b: [b] for b in odd}
    for a in order[:r]:
        groups[odd[partner[a]]].append(even[a])
    body = [i for i in groups if i >= prefix]
    rows, sizes = merged(x, size, [groups[i] for i in body])
    return [i - prefix for i in body], rows, sizes
