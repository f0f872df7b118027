"""The tokens that a part of a text is encoded as."""

from bisect import bisect_left
from collections.abc import Sequence


class TokenOffsets:
    """Offsets of tokens in a text."""

    def __init__(self, text: str, offsets: Sequence[tuple[int, int]]) -> None:
        self.text, self.offsets = text, offsets
        self._stops = [stop for _, stop in offsets]

    def tokens(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens of `text[begin:end]`; one that extends beyond it is included if only by white space."""
        first = bisect_left(self._stops, begin)
        while first < len(self.offsets) and not self._inside(first, begin, end) and self.offsets[first][0] < end:
            first += 1
        last = first
        while last < len(self.offsets) and self._inside(last, begin, end):
            last += 1
        return first, last

    def _inside(self, token: int, begin: int, end: int) -> bool:
        start, stop = self.offsets[token]
        if start == stop:
            return begin <= start < end
        beyond = self.text[start:begin] + self.text[end:stop]
        return stop > begin and start < end and not beyond.strip()
