"""Top-K by class attention, one sample: attention: (H, n)."""

from tests.reference.common import ranked


def scores(attention):
    return [sum(float(head[j]) for head in attention) / len(attention) for j in range(len(attention[0]))]


def topk(attention, k):
    """Returns the k positions, the most attended first."""
    return ranked(scores(attention))[:k]
