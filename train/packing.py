"""Short examples share a row, so that little of what is computed is padding."""

from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `sizes`, each of at most `capacity` in all.

    The largest example is placed first, each in the row that it fills best (best-fit decreasing).
    Examples above the capacity are in no row.
    """
    rows: list[list[int]] = []
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the size that is free
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        if size > capacity:
            continue
        free = next((free for free in range(size, capacity + 1) if by_free[free]), None)
        if free is None:
            free = capacity
            by_free[free].append(len(rows))
            rows.append([])
        row = by_free[free].pop()
        rows[row].append(index)
        by_free[free - size].append(row)
    return rows
