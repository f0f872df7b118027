"""A contact sheet of a frames artifact: the sampled frames, with their times, from the video itself."""

import math
from pathlib import Path

from PIL import Image, ImageDraw

from lvctx.artifacts.store import atomic_file, sha256_file
from lvctx.errors import InputError, library_errors
from lvctx.video.frame_selection import spread
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import read_frames_provenance

MOST, COLUMNS, WIDTH, LABEL = 64, 8, 192, 14
"""Images on a sheet (more frames are thinned evenly), columns, pixels of an image and of its caption."""


def contact_sheet(artifact: Path, out: Path, *, video: Path | None = None) -> dict[str, object]:
    """Draw the sampled frames of `artifact` into the image file `out`; returns a row that describes it.

    The video is read from its path at encoding, from beside the artifact under the same name, or from `video`. Raises
    InputError if `artifact` is not a frames artifact, its video is missing or different, or the suffix is unknown.
    """
    from safetensors import safe_open

    provenance = read_frames_provenance(artifact)
    if out.suffix.lower() not in Image.registered_extensions():
        raise InputError("no image format has this suffix", where=out, fix="call it sheet.png")
    source = video or find_source(Path(str(provenance["facts"].get("source", ""))), artifact)
    if sha256_file(source) != provenance["inputs"].get("video"):
        raise InputError("not the video that was encoded", where=source, fix="give the original with --video")
    with library_errors("unreadable frames artifact", where=artifact), safe_open(artifact, "np") as f:
        pts, index = f.get_tensor("pts"), f.get_tensor("index")
    selected = sorted(set(spread(len(index), min(len(index), MOST))))
    numbers = list(dict.fromkeys(int(index[i]) for i in selected))
    decoder = provenance["config"].get("decoder", "auto")
    frames = {
        f.index: f.image
        for f in read_video(source, VideoSampling(decoder=decoder, allow_partial=True), frame_indices=numbers)
    }
    height, across, _ = next(iter(frames.values())).shape
    side = WIDTH, max(1, round(WIDTH * height / across))
    columns = min(COLUMNS, len(selected))
    sheet = Image.new("RGB", (columns * side[0], math.ceil(len(selected) / columns) * (side[1] + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for cell, i in enumerate(selected):
        x, y = cell % columns * side[0], cell // columns * (side[1] + LABEL)
        if int(index[i]) in frames:
            sheet.paste(Image.fromarray(frames[int(index[i])]).resize(side), (x, y))
        pen.text((x + 2, y + side[1] + 1), f"{clock(float(pts[i]))}  #{index[i]}", fill="black")
    with atomic_file(out) as partial:
        sheet.save(partial, format=Image.registered_extensions()[out.suffix.lower()])
    return {"contact_sheet": str(out), "shown": len(selected), "frames": len(index), "video": str(source)}


def find_source(source: Path, artifact: Path) -> Path:
    """The video of a frames artifact: at the path that it names, or beside it. Raises InputError if it is neither."""
    for candidate in (source, artifact.parent / source.name):
        if candidate.is_file():
            return candidate
    raise InputError(f"its video is missing: {source or 'not recorded'}", where=artifact, fix="give it with --video")


def clock(seconds: float) -> str:
    """`1:02:03.5`, and `-0:00:00.5` before zero."""
    tenths = round(abs(seconds) * 10)
    sign = "-" if seconds < 0 and tenths else ""
    return f"{sign}{tenths // 36000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}.{tenths % 10}"
