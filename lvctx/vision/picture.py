"""Decoded frames as RGB, through the filters that the ffmpeg program itself would insert.

So a rotated, 10-bit or full-range video looks as it does there, to the bit.
"""

from fractions import Fraction
from typing import Any

import av
import numpy as np

_TURNS = {90: (("transpose", "cclock"),), -90: (("transpose", "clock"),)}
_TURNS |= dict.fromkeys((180, -180), (("hflip",), ("vflip",)))  # type: ignore[arg-type]
"""Rotation in degrees, counter-clockwise, that a frame asks for -> FFmpeg's filters."""


class Picture:
    """Converts frames to RGB; the filters are kept as long as the frames stay of one kind. For one thread."""

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._graph: Any = None

    def rgb(self, frame: Any) -> np.ndarray:
        """uint8 (H, W, 3), turned upright."""
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, frame.rotation)
        if kind != self._kind:
            self._kind, self._graph = kind, self._build(frame)
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    @staticmethod
    def _build(frame: Any) -> Any:
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
        ]
        nodes += [graph.add(*turn) for turn in _TURNS.get(frame.rotation, ())]
        nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph
