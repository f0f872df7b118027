"""Samples into rows without cutting one: best-fit decreasing (Johnson 1974).

Longest first, each into the row that it leaves least room in, else into a new one. It needs at most 11/9 of the rows
that the best packing needs, plus 6/9 (Dosa 2007), and no two rows of it would fit into one.
"""

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample numbers, each at most `capacity` in sum. `lengths` are 1 to `capacity`.

    Rows by their room, and the least room that is enough, come from one integer whose bit r says that a row with room r
    is open: time is N log N plus N times capacity / 64.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        assert 0 < length <= capacity
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        rest = room - length
        if rest:
            by_room.setdefault(rest, []).append(row)
            rooms |= 1 << rest
    return rows
