"""Encodes a chat sample as token ids and labels, with a placeholder for every visual token."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from lvctx.data.chat_encoding import encode_messages, to_messages
from lvctx.data.conversations import Conversation
from lvctx.data.row_media import Media
from lvctx.errors import InputError
from lvctx.models.image_processing import image_size
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.token_count import Layout, QwenRule, VisualRule


class ChatSampleEncoder:
    """Encodes samples for one model; images and videos are counted, not encoded."""

    def __init__(
        self,
        tokenizer: Any,
        rule: VisualRule | None,
        *,
        media: Path,
        video_fps: float,
        max_frames: int,
        allow_partial: bool,
    ) -> None:
        """`tokenizer` already has the chat template; `rule` counts visual tokens, None for a language model."""
        self.tokenizer, self.rule, self.media = tokenizer, rule, media
        self.video_fps, self.max_frames, self.allow_partial = video_fps, max_frames, allow_partial
        self._count = lru_cache(maxsize=1 << 16)(self._count_media)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int], list[dict[str, Any]]]:
        """Ids, labels (already shifted) and the media of a sample; see `data.packed_chat`. Raises InputError."""
        rule, where = self.rule, conversation.where
        if rule is None and conversation.media:
            raise InputError("the model has no vision tower", where=where, fix="give --model a vision-language model")
        media = [self._counted(item, where=where) for item in conversation.media]
        messages = to_messages(conversation, rule.mark if rule else str)
        placeholders = [layout.ids for _, layout in media]
        sequence = encode_messages(messages, self.tokenizer, placeholders, where=where)
        references = []
        for start, (facts, layout) in zip(sequence.places, media, strict=True):
            items = [[start + at, b.frames, *b.grid] for at, b in zip(layout.at, layout.blocks, strict=True)]
            references.append({**facts, "at": start, "tokens": sum(b.tokens for b in layout.blocks), "blocks": items})
        return sequence.ids, sequence.labels, references

    def _counted(self, media: Media, *, where: str) -> tuple[dict[str, Any], Layout]:
        try:
            return self._count(media)
        except InputError as e:
            fix = "repair it or --media, or --skip-malformed"
            raise InputError(f"{e.where}: {e.what}", where=where, fix=fix) from e

    def _count_media(self, media: Media) -> tuple[dict[str, Any], Layout]:
        path, rule = self.media / media.path, self.rule
        assert rule is not None
        facts: dict[str, Any] = {"kind": media.kind, "path": media.path}
        if media.kind == "image":
            width, height = image_size(path)
            return {**facts, "width": width, "height": height}, rule.layout(rule.image(width, height))
        from lvctx.video.frame_count import count_frames
        from lvctx.video.reader import read_video

        fps, partial = self.video_fps, self.allow_partial
        count = count_frames(path, VideoSampling(fps=fps, allow_partial=partial))
        spread = count.frames > self.max_frames
        frames = min(count.frames, self.max_frames)
        if spread and partial:  # some of the evenly spaced frames may be missing
            frames = count_frames(path, VideoSampling(frames=self.max_frames, allow_partial=True)).frames
        facts |= {"width": count.width, "height": count.height, "duration": count.duration, "frames": frames}
        facts["fps"] = None if spread else fps
        if partial:
            facts |= {"partial": count.partial} | ({"spread": self.max_frames} if spread else {})
        times: list[float] = []
        if isinstance(rule, QwenRule) and rule.write is not None:
            rate: dict[str, Any] = {"frames": self.max_frames} if spread else {"fps": fps}
            times = [frame.pts for frame in read_video(path, VideoSampling(**rate, allow_partial=partial))]
            facts["frames"] = len(times)
        return facts, rule.layout(rule.video(count.width, count.height, facts["frames"]), times)
