"""DivPrune, one sample: x: (n, D)."""

from tests.reference.common import largest, unit


def divprune(x, k):
    """Returns the k positions in the order of picking."""
    rows = [unit(row) for row in x]
    n = len(rows)
    distance = [[1 - float(rows[i] @ rows[j]) for j in range(n)] for i in range(n)]
    if n == 1:
        return [0]
    picked = [largest([sorted(distance[j])[1] for j in range(n)])]
    while len(picked) < k:
        free = [float("-inf") if j in picked else min(distance[s][j] for s in picked) for j in range(n)]
        picked.append(largest(free))
    return picked
