"""A model behind an OpenAI-compatible server, and how it is asked. Nothing heavy is imported here."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from lvctx.config import Flag
from lvctx.errors import UsageError, first_line

SendMode = Literal["auto", "images", "video", "file-url"]
ON_SERVER = ("endpoint",)
UNUSED_OPTIONS: dict[SendMode, tuple[str, ...]] = {
    "video": ("frame_times", "jpeg_quality"),
    "file-url": ("frame_times", "jpeg_quality", "frame_pixels"),
}
"""Options without effect where no images are sent, or no frames at all."""


def parse_endpoint(text: str) -> str:
    """The base URL of a server's API: `/v1` is added where there is no path. Raises UsageError."""
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(f"--endpoint {text!r} is not a URL", fix="give one such as http://127.0.0.1:8000/v1")
    if url.username or url.password or url.query:
        raise UsageError("--endpoint holds a key or a query", fix="give the key in LVCTX_API_KEY or OPENAI_API_KEY")
    return text.rstrip("/") + ("" if url.path.strip("/") else "/v1")


def parse_body(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"malformed JSON ({first_line(e)})") from None
    if not isinstance(body, dict):
        raise ValueError("a JSON object is wanted")
    return body


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A server, what is sent to it, and for how long an answer is waited for."""

    panel: ClassVar[str] = "Server"

    endpoint: Annotated[str | None, Flag(parse=parse_endpoint, metavar="URL")] = None
    """OpenAI-compatible server (vLLM, SGLang, transformers serve) that runs the model; --model is the model's name on
    the server. The API key is read from LVCTX_API_KEY or OPENAI_API_KEY."""
    timeout: Annotated[float, Flag(min=0.1, needs=ON_SERVER)] = 600.0
    """Deadline of one request, in seconds."""
    retries: Annotated[int, Flag(min=0, needs=ON_SERVER)] = 5
    """Times that a request is repeated after a 429, a 5xx, a deadline, a lost connection or a malformed answer."""
    extra_body: Annotated[dict[str, Any] | None, Flag(parse=parse_body, metavar="JSON", needs=ON_SERVER)] = None
    """Fields to add to every request, such as {"mm_processor_kwargs": {...}} for vLLM."""


@dataclass(frozen=True, kw_only=True)
class VideoEndpointConfig(EndpointConfig):
    """The same, with how videos are sent."""

    send: Annotated[SendMode, Flag(needs=ON_SERVER)] = "auto"
    """Send the sampled frames as images (auto), or as one video of constant rate; or the URL of the file, which the
    server samples itself."""
    frame_times: Annotated[bool, Flag(needs=ON_SERVER)] = True
    """Write each frame's time before its image, as <12.0 seconds>."""
    frame_pixels: Annotated[int, Flag(min=784, needs=ON_SERVER)] = 200_704
    """Pixels of the largest frame or image that is sent (200704 is 448 x 448); larger ones are scaled down."""
    jpeg_quality: Annotated[int, Flag(min=1, max=100, needs=ON_SERVER)] = 90
    """Quality of the JPEG images that are sent."""


@dataclass(frozen=True, kw_only=True)
class ConcurrentEndpointConfig(VideoEndpointConfig):
    """The same, for many videos."""

    jobs: Annotated[int, Flag(min=1, needs=ON_SERVER)] = 4
    """Requests at once. The questions about one video follow each other, so that the server can reuse its prefix."""


@dataclass(frozen=True, kw_only=True)
class TextEndpointConfig(EndpointConfig):
    """The same, for text."""

    jobs: Annotated[int, Flag(min=1, needs=ON_SERVER)] = 4
    """Requests at once; cells that share most follow each other, so that the server can reuse their prefix."""
    prompt_as: Annotated[Literal["completion", "chat"], Flag(needs=ON_SERVER)] = "completion"
    """Send the prompt as a text to continue (/v1/completions), or as a user's turn, for servers that only have chat."""
    tokenizer: Annotated[str | None, Flag(needs=ON_SERVER)] = None
    """Tokenizer that lengths are measured with: directory or hub id. Default: --model."""
