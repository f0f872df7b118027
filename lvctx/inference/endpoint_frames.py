"""Videos and images as the parts of a chat message that an OpenAI-compatible server takes."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.artifacts.store import sha256_file
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.inference.endpoint_config import VideoEndpointConfig
from lvctx.inference.engine import Shown
from lvctx.video.frame_count import bounded
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

SENT_FRAMES = 128
"""Default maximum number of frames of a video that are sent."""
Part = dict[str, Any]


def resolve_for_endpoint(config: VideoEndpointConfig, sampling: VideoSampling) -> VideoSampling:
    """With the defaults for a server: one frame per second, at most `SENT_FRAMES` of them. Raises UsageError."""
    if config.send == "file-url":
        if sampling != VideoSampling():
            raise UsageError("with --send file-url the server samples the video", fix="drop the options of sampling")
        return sampling
    if sampling.resolution is not None or sampling.frame_mode is not None or sampling.threshold is not None:
        fix = "drop --hybrid, --hybrid-mode, --frame-selection and --frame-mode"
        raise UsageError("a server decides the resolution of frames itself", fix=fix)
    sampling.refuse_separator("a server writes what is between frames")
    if sampling.has_default_rate:
        sampling = replace(sampling, fps=1.0)
    if sampling.fps is not None and sampling.fps != "native" and sampling.max_frames is None:
        sampling = replace(sampling, max_frames=SENT_FRAMES)
    return sampling


def fit_pixels(image: Image.Image, pixels: int) -> Image.Image:
    """The image with at most so many pixels, same aspect but for rounding; bicubic."""
    width, height = image.size
    scale = math.sqrt(pixels / (width * height))
    if scale >= 1:
        return image
    size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def image_part(image: Image.Image, config: VideoEndpointConfig) -> Part:
    """A message part with the image as a JPEG in its URL."""
    data = io.BytesIO()
    fit_pixels(image, config.frame_pixels).save(data, format="JPEG", quality=config.jpeg_quality)
    return {"type": "image_url", "image_url": {"url": _data_url("image/jpeg", data.getvalue())}}


def time_part(seconds: float) -> Part:
    """A message part with the time of the frame after it, as Qwen3-VL writes it."""
    return {"type": "text", "text": f"<{seconds:.1f} seconds>"}


def frame_parts(frames: Sequence[tuple[float, Part]], config: VideoEndpointConfig) -> list[Part]:
    """Frames with their seconds, each after its time where times are sent."""
    return [part for s, image in frames for part in ((time_part(s), image) if config.frame_times else (image,))]


@dataclass(frozen=True, kw_only=True)
class VideoParts:
    """A video as it is sent."""

    parts: list[Part]
    """Of the message."""
    shown: Shown
    """Its times and facts."""


def video_parts(path: Path, sampling: VideoSampling, config: VideoEndpointConfig, meter: CostMeter) -> VideoParts:
    """Read a video as the server is sent it. Raises InputError for a file that cannot be read."""
    if path.name.endswith(".safetensors"):
        raise InputError("vision features cannot be sent to a server", where=path, fix="give the video file")
    if config.send == "file-url":
        if not path.is_file():
            raise InputError("no such file", where=path)
        url = path.resolve().as_uri()
        facts = {"video_sha256": sha256_file(path)[:16], "send": "file-url", "times": "server"}
        return VideoParts(parts=[_video(url)], shown=Shown(pts=(), facts=facts))
    reader = read_video(path, bounded(path, sampling), prepare=lambda image: _fit(image, config.frame_pixels))
    pts: list[float] = []
    images: list[Image.Image] = []
    parts: list[Part] = []
    for frame in meter.decoding(reader):
        image = Image.fromarray(frame.image)
        pts.append(frame.pts)
        if config.send == "video":
            images.append(image)
        else:
            with meter.phase("encode"):
                parts.append(image_part(image, config))
    if images:
        with meter.phase("encode"):
            parts = [_video(_data_url("video/mp4", encode_clip(images, pts)))]
        times = "constant rate"
    else:
        parts, times = frame_parts(list(zip(pts, parts, strict=True)), config), "text" if config.frame_times else "none"
    sent: dict[str, Any] = {
        "video_sha256": sha256_file(path)[:16],
        "frames": len(pts),
        "corrupt_frames": reader.facts.get("corrupt", 0),
        "send": "video" if images else "images",
        "times": times,
        **({"partial": True} if reader.facts.get("partial") else {}),
    }
    return VideoParts(parts=parts, shown=Shown(pts=tuple(pts), facts=sent))


def encode_clip(images: Sequence[Image.Image], pts: Sequence[float]) -> bytes:
    """An H.264 video of the images at the mean rate of their times; even sides, as its chroma needs."""
    import av

    rate = (len(pts) - 1) / (pts[-1] - pts[0]) if len(pts) > 1 and pts[-1] > pts[0] else 1.0
    width, height = (max(2, side // 2 * 2) for side in images[0].size)
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        options = {"crf": "18", "threads": "1"}
        stream: Any = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in images:
            frame = image if image.size == (width, height) else image.resize((width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return data.getvalue()


def _fit(image: np.ndarray, pixels: int) -> np.ndarray:
    return np.asarray(fit_pixels(Image.fromarray(image), pixels))


def _video(url: str) -> Part:
    return {"type": "video_url", "video_url": {"url": url}}


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
