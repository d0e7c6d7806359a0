"""HiPrune, one sample: middle, deep: (H, n) attention received in two layers."""

from tests.reference.common import ranked


def hiprune(middle, deep, k, alpha, width):
    """Returns the kept positions, ascending; a width of 0 says that rows are not known."""
    n = len(middle[0])
    shallow = [sum(float(head[j]) for head in middle) for j in range(n)]
    chosen = []
    for anchor in ranked(shallow)[: round(k * alpha / 5)]:
        for j in (anchor, anchor - 1, anchor + 1, *((anchor - width, anchor + width) if width else ())):
            j = min(max(j, 0), n - 1)
            if j not in chosen:
                chosen.append(j)
    received = [sum(float(head[j]) for head in deep) for j in range(n)]
    order = ranked(received)
    return sorted([*(j for j in order if j in chosen), *(j for j in order if j not in chosen)][:k])
