"""Decoded frames as RGB, through the filters that the ffmpeg program itself would insert.

So the pixels of a rotated, 10-bit or full-range video are bit-identical to the program's.
"""

import math
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np

Filters = tuple[tuple[str, ...], ...]
"""Name and arguments of FFmpeg's filters, in order."""


def upright(matrix: bytes | None) -> Filters:
    """The filters that the ffmpeg program inserts for a display matrix (nine int32, row by row): rotations and flips.

    After `configure_input_video_filter` of fftools/ffmpeg_filter.c and `av_display_rotation_get` of libavutil.
    """
    if matrix is None:
        return ()
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return ()
    theta = math.floor(math.degrees(math.atan2(b / down, a / across)) + 0.5) % 360
    if theta == 90:
        return (("transpose", "cclock_flip" if c > 0 else "clock"),)
    if theta == 180:
        return (("hflip",),) * (a < 0) + (("vflip",),) * (d < 0)
    if theta == 270:
        return (("transpose", "clock_flip" if c < 0 else "cclock"),)
    if theta > 1:
        return (("rotate", f"{theta}*PI/180"),)
    return (("vflip",),) * (d < 0)


class RgbConverter:
    """Converts frames to RGB; the filters are reused while the frames' format does not change. For one thread."""

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._graph: Any = None

    def rgb(self, frame: Any) -> np.ndarray:
        """uint8 (H, W, 3), turned upright."""
        display_matrix = frame.side_data.get("DISPLAYMATRIX")
        matrix = None if display_matrix is None else bytes(display_matrix)
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, matrix)
        if kind != self._kind:
            self._kind, self._graph = kind, self._build(frame, upright(matrix))
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    @staticmethod
    def _build(frame: Any, turns: Filters) -> Any:
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
        ]
        nodes += [graph.add(*turn) for turn in turns]
        nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph
