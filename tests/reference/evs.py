"""EVS, one sample: x: (frames * patches, D)."""

from tests.reference.common import ranked, unit


def evs(x, frames, k):
    """Returns the kept positions, ascending."""
    patches = len(x) // frames
    change = []
    for j in range(len(x)):
        change.append(float("inf") if j < patches else 1 - float(unit(x[j]) @ unit(x[j - patches])))
    return sorted(ranked(change)[:k])
