"""FoPru, one sample: attention: (H, n) received by each token."""

from tests.reference.common import ranked
from tests.reference.topk import scores, topk


def by_rank(attention, k):
    """Returns the kept positions, ascending."""
    return sorted(topk(attention, k))


def by_row(attention, k, columns):
    """The same for whole rows of patches; the best tokens of the next row fill up the rest."""
    score = scores(attention)
    rows = [range(start, start + columns) for start in range(0, len(score), columns)]
    kept = []
    for r in ranked([sum(score[j] for j in row) for row in rows]):
        best = ranked([score[j] for j in rows[r]])
        kept += [rows[r][i] for i in best[: k - len(kept)]]
    return sorted(kept)
