"""HoloV, one sample: attention: (H, n), x: (n, D)."""

import math

from tests.reference.common import ranked, unit
from tests.reference.topk import scores

EPS = 1e-6


def chunk_score(rows, attention, alpha):
    m = len(rows)
    variances = []
    for i in range(m):
        similar = [0.0 if i == j else float(rows[i] @ rows[j]) for j in range(m)]
        mean = sum(similar) / (m - 1)
        variances.append(sum((s - mean) ** 2 for s in similar) / (m - 1))
    level = [1000 * a for a in attention]
    scale = sum(level) / m / (sum(variances) / m + EPS)
    return sum(a + alpha * scale * v for a, v in zip(level, variances)) / m


def quotas(attention, x, k, groups, alpha):
    """Returns the chunks, and how many tokens each of them is given."""
    n = len(x)
    groups = max(1, min(groups, n // 2))
    weight, rows, parts, start = scores(attention), [unit(row) for row in x], [], 0
    for g in range(groups):
        size = n // groups + (g < n % groups)
        parts.append(range(start, start + size))
        start += size
    points = [chunk_score([rows[j] for j in part], [weight[j] for j in part], alpha) for part in parts]
    share = [p / (sum(points) + EPS) for p in points]
    counts = [math.floor(s * k) for s in share]
    for g in ranked(share)[: k - sum(counts)]:
        counts[g] += 1
    return parts, counts


def holov(attention, x, k, groups, alpha):
    """Returns the kept positions, ascending; what no chunk could use goes to the most attended of the others."""
    weight = scores(attention)
    kept = []
    for part, count in zip(*quotas(attention, x, k, groups, alpha)):
        kept += [part[i] for i in ranked([weight[j] for j in part])[:count]]
    kept += [j for j in ranked(weight) if j not in kept][: k - len(kept)]
    return sorted(kept)
