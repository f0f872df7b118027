"""Write a redistributable haystack: synthetic scenes with the user's openly licensed clips between them.

Frames come from a generator and are written in batches: as vision features, as images, or as a video. The pixels of
every frame are hashed, so that two machines can check that they have the same haystack.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.artifacts import schemas
from lvctx.artifacts.bounded import read_utf8
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import Provenance, is_finished, write_manifest
from lvctx.artifacts.store import atomic_file, sha256_file
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.haystack_config import HaystackConfig
from lvctx.video.container import check_complete
from lvctx.video.drawn_scenes import VERSION, scene
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import SUFFIX, open_frames
from lvctx.vlm.video_encoder import VideoEncoder

PIXELS_SUFFIX = ".pixels.txt"
"""Suffix of the file beside a haystack that has the hash of each frame, one per line."""


def haystack_frames(config: HaystackConfig) -> Iterator[np.ndarray]:
    """The frames, uint8 (H, W, 3), in order. Raises InputError for a clip that cannot be read."""
    order = sorted(
        config.clips, key=lambda clip: hashlib.sha256(f"{config.seed}\0{sha256_file(clip)}".encode()).digest()
    )
    return islice(_endless(config, order), config.frames)


def _endless(config: HaystackConfig, clips: Sequence[Path]) -> Iterator[np.ndarray]:
    for number in count():
        yield from scene(config.seed, number, config.side + config.side % 2)
        if number < len(clips):
            video = read_video(clips[number], VideoSampling(fps=config.fps, allow_partial=config.allow_partial))
            yield from (frame.image for frame in video)


def hash_frame(frame_HW3: np.ndarray) -> str:
    """Sixteen hex digits of a frame's size and pixels."""
    return hashlib.sha256(f"{frame_HW3.shape}".encode() + frame_HW3.tobytes()).hexdigest()[:16]


def write_haystack(
    config: HaystackConfig,
    out: Path,
    *,
    encoder: VideoEncoder | None,
    pixels: Path | None,
    resume: str,
    force: bool,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Write a frames artifact (with an `encoder`), an .mp4, or a directory of images; returns its row.

    `pixels` is a file of the hashes that the frames must have. Raises InputError for the first frame that differs, and
    UsageError if `encoder` and the name of `out` contradict each other. After an error `out` does not exist.
    """
    if out.name.endswith(SUFFIX) != (encoder is not None):
        raise UsageError(f"-o {out}: --model needs a name that ends in {SUFFIX}, and such a name needs --model")
    partial_clips = [str(clip) for clip in config.clips if not check_complete(clip, allow_partial=config.allow_partial)]
    provenance = Provenance(
        schema=schemas.FRAMES if encoder else schemas.HAYSTACK,
        command="niah haystack",
        config={
            "frames": config.frames,
            "side": config.side + config.side % 2,
            "fps": config.fps,
            "scenes": VERSION,
            **({"allow_partial": True} if config.allow_partial else {}),
            **({"frame_mode": encoder.config.sampling.frame_mode, "dtype": encoder.config.dtype} if encoder else {}),
        },
        inputs={
            **({"tower": encoder.files.fingerprint} if encoder else {}),
            **{f"clip{i}": digest for i, digest in enumerate(sorted(sha256_file(clip) for clip in config.clips))},
        },
        seed=config.seed,
    )
    with only_writer(out.parent, name=f".{out.name}.lock", wait=True):
        if out.suffix == ".mp4":
            if out.exists() and not force:
                raise InputError("already exists", where=out, fix="choose another -o, or --force to overwrite it")
        elif is_finished(out, provenance, resume=resume, force=force):
            return _row(config, out)
        expected = read_utf8(pixels).split() if pixels else None
        hashes: list[str] = []

        def checked() -> Iterator[np.ndarray]:
            for frame in haystack_frames(config):
                hashes.append(hash_frame(frame))
                if expected is not None and expected[len(hashes) - 1 : len(hashes)] != hashes[-1:]:
                    raise InputError(
                        f"frame {len(hashes) - 1} has other pixels",
                        where=pixels,
                        fix="give the same clips, seed and version",
                    )
                on_progress(len(hashes), config.frames, f"{len(hashes):,} seconds")
                yield frame

        if encoder:
            _encode(checked(), out, provenance, encoder)
        elif out.suffix == ".mp4":
            _write_video(checked(), out, config.side + config.side % 2)
        else:
            _save(checked(), out, provenance)
        with atomic_file(_pixels_of(out)) as partial:
            partial.write_text("".join(f"{digest}\n" for digest in hashes), encoding="utf-8")
        return _row(config, out) | ({"partial": partial_clips} if partial_clips else {})


def _pixels_of(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(SUFFIX).removesuffix(".mp4") + PIXELS_SUFFIX)


def _row(config: HaystackConfig, out: Path) -> dict[str, Any]:
    digest = sha256_file(out if out.is_file() else out / "MANIFEST.json")
    pixels = _pixels_of(out)
    return {
        "schema": schemas.FRAMES if out.name.endswith(SUFFIX) else schemas.HAYSTACK,
        "path": str(out),
        "sha256": digest,
        "frames": config.frames,
        "pixels": str(pixels),
        "pixels_sha256": sha256_file(pixels) if pixels.is_file() else None,
    }


def _encode(frames: Iterator[np.ndarray], out: Path, provenance: Provenance, encoder: VideoEncoder) -> None:
    square, batch = encoder.files.preprocess.square, encoder.config.batch
    mode = encoder.config.sampling.frame_mode or "pad"
    done = 0
    with open_frames(out, provenance, {}) as writer:
        while images := [np.asarray(square(Image.fromarray(frame), mode)) for frame in islice(frames, batch)]:
            seconds = range(done, done + len(images))
            writer.append(encoder.encode_images(np.stack(images)), [float(s) for s in seconds], list(seconds))
            done += len(images)


def _save(frames: Iterator[np.ndarray], out: Path, provenance: Provenance) -> None:
    names = []
    for i, frame in enumerate(frames):
        names.append(f"{i:06}.png")
        with atomic_file(out / names[-1]) as partial:
            Image.fromarray(frame).save(partial, format="png")
    write_manifest(out, provenance, names)


def _write_video(frames: Iterator[np.ndarray], out: Path, side: int) -> None:
    """H.264 at one frame per second, scaled to `side`; lossy, so its pixels are close to the hashed ones, not equal."""
    import av

    with atomic_file(out) as partial, av.open(f"file:{partial}", "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=1, options={"crf": "12", "threads": "1"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
