"""Packing samples into rows without truncating any: best-fit decreasing (Johnson 1974).

Samples are placed longest first, each into the row with the least sufficient room, else into a new row. This needs at
most 11/9 of the rows of an optimal packing, plus 6/9 (Dosa 2007), and no two of its rows would fit into one.
"""

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample numbers, each at most `capacity` in total. `lengths` are 1 to `capacity`.

    The least sufficient room is found in an integer whose bit r is set if a row with room r is open: time is N log N
    plus N times capacity / 64.
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
