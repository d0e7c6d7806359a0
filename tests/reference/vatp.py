"""VATP, one sample: attention: (H, n) of the last token, values: (Hkv, n, d)."""

from tests.reference.common import ranked


def vatp(attention, values, k):
    """Returns the kept positions, ascending."""
    heads, shared = len(attention), len(attention) // len(values)
    score = []
    for j in range(len(attention[0])):
        score.append(sum(float(attention[h][j]) * sum(abs(float(v)) for v in values[h // shared][j]) for h in range(heads)))
    return sorted(ranked(score)[:k])
