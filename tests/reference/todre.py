"""ToDRE's first stage, one sample: x: (n, D), summary: (D,) or None."""

from tests.reference.common import largest, unit


def todre(x, summary, k, objective):
    """Returns the k positions in the order of picking; objective: `sum` or `min`, of the distances to all picked."""
    rows = [unit(row) for row in x]
    n = len(rows)
    distance = [[1 - float(rows[i] @ rows[j]) for j in range(n)] for i in range(n)]
    if summary is None:
        picked = [largest([sorted(row)[1] for row in distance])]
    else:
        picked = [largest([-float(unit(summary) @ row) for row in rows])]
    while len(picked) < k:
        free = [float("-inf") if j in picked else objective(distance[s][j] for s in picked) for j in range(n)]
        picked.append(largest(free))
    return picked
