"""DART on embeddings, one sample: image: (n, D), text: (T, D) all text of the prompt."""

from tests.reference.common import ranked, unit


def dart_embeds(image, text, k, pivots, text_pivots):
    """Returns the kept positions, ascending."""

    def loud(rows):
        return ranked([sum(abs(float(v)) for v in row) for row in rows])

    kept = loud(image)[: min(pivots, k)]
    turns = [unit(image[j]) for j in kept] + [unit(text[j]) for j in loud(text)[:text_pivots]]
    for i, pivot in enumerate(turns):
        missing, left = k - len(kept), len(turns) - i
        free = [j for j in range(len(image)) if j not in kept]
        unlike = ranked([-float(pivot @ unit(image[j])) for j in free])
        kept += [free[j] for j in unlike[: missing // left + (missing % left > 0)]]
    return sorted(kept)
