"""The even sub-grid: tries every rows x columns = k."""


def spread(n, k):
    """Centres of k equal cells of [0, n), rounded down."""
    return [int((i + 0.5) * n / k + 1e-9) for i in range(k)]


def grid(n, k, shape):
    """Returns the kept positions, ascending; shape: (rows, columns) or None."""
    best = None
    for r in range(1, (shape or (0, 0))[0] + 1):
        for c in range(1, shape[1] + 1):
            thinning = (shape[0] / r, shape[1] / c)
            skew = max(thinning) / min(thinning)
            if r * c == k and skew <= 2 + 1e-9 and (best is None or skew < best[0] - 1e-9):
                best = (skew, r, c)
    if best is None:
        return spread(n, k)
    return [r * shape[1] + c for r in spread(shape[0], best[1]) for c in spread(shape[1], best[2])]
