"""VisionZip, one sample: attention: (H, n), keys: (H, n, d), x: (n, D)."""

import numpy as np

from tests.reference.common import head_mean, largest, ranked, unit


def visionzip(attention, keys, x, dominant, contextual):
    """Returns the positions of the new tokens, dominant ones ascending before the targets, and the contextual rows."""
    n = len(x)
    score = [sum(float(head[j]) for head in attention) for j in range(n)]
    kept = sorted(ranked(score)[:dominant])
    rest = [j for j in range(n) if j not in kept]
    step = max(1, len(rest) // max(contextual, 1))
    targets = rest[::step][:contextual]
    metric = [unit(row) for row in head_mean(keys)]
    members = {t: [] for t in targets}
    for j in rest:
        if j not in members and targets:
            members[targets[largest([float(metric[j] @ metric[t]) for t in targets])]].append(j)
    wide = np.asarray(x, dtype=np.float64)
    rows = [wide[t] + sum(wide[j] for j in members[t]) / max(1, len(members[t])) for t in targets]
    return [*kept, *targets], rows
