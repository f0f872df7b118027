"""Chat samples of several kinds in, rows of about one length out: GIRAFFE's data recipe (section 2, ETVLM).

Every sample is tokenized once, its images and videos counted by what the model will make of them, and laid on disk;
then samples are chosen so that every kind has its share, and put whole into rows by best-fit decreasing. In memory are
a few numbers a sample, whatever its length. A run that was killed begins again.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.chat import lines_name, write_chat_shard, write_lines
from lvctx.artifacts.manifest import MANIFEST, Provenance, is_finished, read_manifest, write_manifest
from lvctx.artifacts.packed import shard_name
from lvctx.artifacts.store import disk_error, fingerprint, is_disk_error, sha256_file
from lvctx.errors import InputError, UsageError
from lvctx.model.load import load_tokenizer, resolve_model
from lvctx.model.loss import IGNORED
from lvctx.model.template import Visual, chat_encoder
from lvctx.text.bestfit import best_fit_decreasing
from lvctx.text.blend import choose, largest_blend
from lvctx.text.hub import hub_commit
from lvctx.text.pack import BINS, bin_names, uniform
from lvctx.train.chat import CHATML, encode_messages
from lvctx.train.samples import ChatSample, Media, check_row, read_rows
from lvctx.train.tables import is_table
from lvctx.vision.hybrid import Hybrid
from lvctx.vision.images import image_size
from lvctx.vision.sampling import VideoSampling
from lvctx.vision.tokens import Block, VisualRule
from lvctx.vlm.registry import family_of, open_vlm

log = logging.getLogger(__name__)
Report = Callable[[int, int, str], None]

KINDS = ("text", "image", "interleaved", "video")
SHARES = {"text": 0.20, "image": 0.25, "interleaved": 0.25, "video": 0.30}
"""GIRAFFE's recipe, by tokens."""
LEFT_OUT = "left-out.jsonl"
SPOOL = (".spool.tokens", ".spool.jsonl")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """What decides the rows, besides model, samples and media."""

    target_length: int
    """Tokens that no row exceeds; GIRAFFE 64K, then 128K."""
    mix: dict[str, float]
    """Share of tokens of each kind, summing to 1; GIRAFFE 20, 25, 25, 30%."""
    tokens: int | None
    """Tokens to pack; None packs as many as the mix allows."""
    long_share: float
    """Least share of tokens in long samples; GIRAFFE 0.6."""
    long_over: int
    """Tokens beyond which a sample is long; GIRAFFE 8K."""
    video_fps: float
    """Frames a second of a video; GIRAFFE 2."""
    max_frames: int
    """Frames of a video beyond which they are spread evenly instead; Qwen2-VL 768."""
    hybrid: dict[str, Any] | None
    """`vision.hybrid.Hybrid` of videos, as JSON; None is uniform resolution at the model's usual tokens."""
    template: str
    """`chatml`, or `own`: the tokenizer's."""
    skip_malformed: bool
    """Leave out what is not right, and name it, instead of stopping."""
    allow_partial: bool = False
    """Whether a video that is cut short or damaged is taken for what is left of it; it is decoded to count that."""
    shard_tokens: int
    """Tokens after which a shard is closed."""
    seed: int
    """Which samples are taken, and their order."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run."""

    config: ChatConfig
    """With every default resolved."""
    sources: Mapping[str, Sequence[Path]]
    """Files of each kind."""
    media: Path
    """Folder that paths of images and videos are relative to."""
    tokenizer: Any
    """With the template in place."""
    rule: VisualRule | None
    """What the model makes of pixels; None for a language model."""
    provenance: Provenance
    """What identifies the run."""


def plan_chat(
    sources: Mapping[str, Sequence[Path]],
    *,
    model: str,
    media: Path,
    mix: Mapping[str, float] | None,
    hybrid: Mapping[str, Any] | None,
    **options: Any,
) -> Plan:
    """Check inputs and resolve defaults; `options` are ChatConfig's. Reads no weights and no samples.

    `mix` holds weights by kind; None takes GIRAFFE's of the kinds given. Raises UsageError and InputError.
    """
    sources = {kind: list(sources.get(kind, ())) for kind in KINDS if sources.get(kind)}
    if not sources:
        raise UsageError("no samples", fix=f"give one of {', '.join('--' + k for k in KINDS)}")
    for paths in sources.values():
        for path in paths:
            if not path.is_file() and not is_table(path):
                raise InputError("no such file", where=path)
    config = ChatConfig(mix=_shares(mix, sources), hybrid=dict(hybrid) if hybrid else None, **options)
    path = resolve_model(model, weights=False)
    tokenizer = load_tokenizer(path)
    if config.template == "chatml":
        if None in (known := [tokenizer.get_vocab().get(t) for t in ("<|im_start|>", "<|im_end|>")]):
            raise InputError(f"no ChatML tokens {known}", where=model, fix="--template own takes the tokenizer's own")
        tokenizer.chat_template = CHATML
    elif tokenizer.chat_template is None:
        raise InputError("no chat template", where=model, fix="--template chatml, or an instruct model")
    chat_encoder(tokenizer)
    resolution = (
        {} if config.hybrid is None else {"hybrid": Hybrid(**config.hybrid), "hybrid_mode": config.hybrid["mode"]}
    )
    rule = open_vlm(path).token_rule(VideoSampling(**resolution)) if family_of(path) else None
    small = [path / name for name in ("tokenizer.json", "config.json", "preprocessor_config.json")]
    inputs = {"model": " ".join(sha256_file(p) for p in small if p.is_file())}
    inputs |= {kind: " ".join(map(_identify, paths)) for kind, paths in sources.items()}
    provenance = Provenance(
        schema=schemas.CHAT, command="pack-chat", config=_decided(config), inputs=inputs, seed=config.seed
    )
    return Plan(config=config, sources=sources, media=media, tokenizer=tokenizer, rule=rule, provenance=provenance)


def _decided(config: ChatConfig) -> dict[str, Any]:
    """The configuration as the manifest has it; what was packed before there was `allow_partial` stands as it is."""
    decided = asdict(config)
    if not config.allow_partial:
        del decided["allow_partial"]
    return decided


def _identify(path: Path) -> str:
    """Of a file or a folder the hash, of a dataset on the hub the commit."""
    return fingerprint(path) if path.exists() else hub_commit(str(path))


def _shares(mix: Mapping[str, float] | None, sources: Mapping[str, Any]) -> dict[str, float]:
    if mix is None:
        mix = {kind: SHARES[kind] for kind in sources}
        if len(mix) < len(SHARES):
            log.warning("no source of %s: the others share its part", ", ".join(k for k in SHARES if k not in mix))
    for kind in mix:
        if mix[kind] and kind not in sources:
            raise UsageError(f"--mix gives {kind} a share, but there is no --{kind}", fix=f"add --{kind} FILE")
    for kind in sources:
        if kind not in mix:
            raise UsageError(f"--{kind} is not in --mix", fix=f"write {kind}=SHARE into it")
    total = sum(mix.values())
    if total <= 0:
        raise UsageError("the shares of --mix sum to 0")
    return {kind: mix[kind] / total for kind in KINDS if kind in sources}


def run_chat(plan: Plan, out: Path, *, resume: str = "auto", force: bool = False, report: Report) -> dict[str, Any]:
    """Write the directory and return its manifest; nothing to do if it stands finished."""
    if not is_finished(out, plan.provenance, resume=resume, force=force):
        if resume == "must":
            raise InputError("unfinished, and this command begins again", where=out, fix="drop --resume must")
        try:
            out.mkdir(parents=True, exist_ok=True)
            _ChatPacker(plan, out, report).run()
        except OSError as e:
            if is_disk_error(e):
                raise disk_error(e, out) from e
            raise
        finally:
            for name in SPOOL:
                (out / name).unlink(missing_ok=True)
    return read_manifest(out)


class _ChatPacker:
    """One run. Samples that can be packed are numbered in the order they are read."""

    def __init__(self, plan: Plan, out: Path, report: Report) -> None:
        self.plan, self.config, self.out, self.report = plan, plan.config, out, report
        self.kinds: list[str] = []
        self.lengths: list[int] = []
        self.lines_at: list[int] = [0]
        self.left_out: list[dict[str, Any]] = []
        self._facts = lru_cache(maxsize=1 << 16)(self._media_facts)

    def run(self) -> None:
        """Tokenize all, choose, pack, write."""
        for pattern in (MANIFEST, "shard-*", ".*.partial"):
            for path in self.out.glob(pattern):
                path.unlink()
        with open(self.out / SPOOL[0], "wb") as tokens, open(self.out / SPOOL[1], "wb") as lines:
            for kind, paths in self.plan.sources.items():
                for path in paths:
                    self._read(kind, path, tokens, lines)
        chosen = self._choose()
        rows = self._rows(chosen)
        self._write(rows)

    # Reading

    def _read(self, kind: str, path: Path, tokens: Any, lines: Any) -> None:
        where = None
        for where, row in read_rows(path, self.plan.media):
            try:
                sample = check_row(row, where)
                if kind == "text" and sample.media:
                    raise InputError("an image or video in a --text source", where=where, fix="give it as another kind")
                ids, labels, media = self._encode(sample)
            except InputError as e:
                if not self.config.skip_malformed:
                    raise
                self.left_out.append({"source": where, "kind": kind, "tokens": None, "why": str(e)})
                continue
            if len(ids) > self.config.target_length:
                self.left_out.append({"source": where, "kind": kind, "tokens": len(ids), "why": "too long"})
                log.warning("%s: %s tokens, longer than a row: left out", where, f"{len(ids):,}")
                continue
            tokens.write(np.array([ids, labels], np.int32).tobytes())
            line = json.dumps({"source": where, "kind": kind, "tokens": len(ids), "media": media}, ensure_ascii=False)
            self.lines_at.append(self.lines_at[-1] + lines.write(line.encode()))
            self.kinds.append(kind)
            self.lengths.append(len(ids))
            self.report(len(self.lengths), 0, f"samples read, {path.name}")
        if where is None:
            raise InputError("no sample in it", where=path)

    def _encode(self, sample: ChatSample) -> tuple[list[int], list[int], list[dict[str, Any]]]:
        rule = self.plan.rule
        if rule is None and sample.media:
            raise InputError("the model cannot see", where=sample.where, fix="--model takes a vision-language model")
        messages: list[dict[str, Any]] = []
        media = []
        for role, parts in sample.turns:
            content: list[str | Visual] = []
            for part in parts:
                if isinstance(part, Media):
                    assert rule is not None
                    try:
                        facts, blocks = self._facts(part)
                    except InputError as e:
                        fix = "mend it or --media, or --skip-malformed"
                        raise InputError(f"{e.where}: {e.what}", where=sample.where, fix=fix) from e
                    media.append((facts, blocks, rule.layout(blocks)))
                    content.append(Visual(rule.mark(part.kind)))
                else:
                    content.append(part)
            messages.append({"role": role, "content": content})
        sequence = encode_messages(
            messages, self.plan.tokenizer, [layout.ids for _, _, layout in media], where=sample.where
        )
        references = []
        for place, (facts, blocks, layout) in zip(sequence.places, media, strict=True):
            items = [[place + at, b.frames, *b.grid] for at, b in zip(layout.at, blocks, strict=True)]
            references.append({**facts, "at": place, "tokens": sum(b.tokens for b in blocks), "blocks": items})
        return sequence.ids, sequence.labels, references

    def _media_facts(self, media: Media) -> tuple[dict[str, Any], list[Block]]:
        path, rule = self.plan.media / media.path, self.plan.rule
        assert rule is not None
        facts: dict[str, Any] = {"kind": media.kind, "path": media.path}
        if media.kind == "image":
            width, height = image_size(path)
            return {**facts, "width": width, "height": height}, rule.image(width, height)
        from lvctx.vision.decode import count_frames

        fps, most, partial = self.config.video_fps, self.config.max_frames, self.config.allow_partial
        count = count_frames(path, VideoSampling(fps=fps, allow_partial=partial))
        spread = count.frames > most
        frames = min(count.frames, most)
        if spread and partial:  # some of those may be missing
            frames = count_frames(path, VideoSampling(frames=most, allow_partial=True)).frames
        facts |= {"width": count.width, "height": count.height, "duration": count.duration, "frames": frames}
        facts["fps"] = None if spread else fps
        if partial:
            facts |= {"partial": count.partial} | ({"spread": most} if spread else {})
        return facts, rule.video(count.width, count.height, frames)

    # Choosing

    def _choose(self) -> np.ndarray:
        """Numbers of the samples to pack, ascending."""
        config, lengths, kinds = self.config, np.array(self.lengths, np.int64), np.array(self.kinds)
        numbers = {kind: np.flatnonzero(kinds == kind) for kind in config.mix}
        empty = [kind for kind in config.mix if config.mix[kind] and not len(numbers[kind])]
        if empty:
            raise InputError(f"no sample of {', '.join(empty)} can be packed", fix="see what was left out, or --mix")
        of = {kind: lengths[numbers[kind]] for kind in config.mix}
        rule = {"long_share": config.long_share, "long_over": config.long_over}
        most = largest_blend(of, config.mix, **rule)  # type: ignore[arg-type]
        tokens = config.tokens or most
        if tokens > most:
            short = {k: round(s * tokens) - int(of[k].sum()) for k, s in config.mix.items()}
            lines = [f"{k} is {n:,} tokens short" for k, n in short.items() if n > 0] or ["too few long samples"]
            raise InputError(
                f"{tokens:,} tokens cannot be met ({', '.join(lines)})",
                fix=f"--tokens {most} is the most that mix and long share allow, or add samples",
            )
        taken = choose(of, config.mix, tokens=tokens, seed=config.seed, **rule)  # type: ignore[arg-type]
        chosen = np.sort(np.concatenate([numbers[kind][taken[kind]] for kind in config.mix]))
        if not len(chosen):
            raise InputError(
                f"no long sample fits into its share of {tokens:,} tokens", fix="add samples, or lower --long-share"
            )
        self.tokens = tokens
        return chosen

    def _rows(self, chosen: np.ndarray) -> list[list[int]]:
        """Sample numbers of every row; rows, and samples inside one, in an order drawn from the seed."""
        draws = uniform(self.config.seed, np.arange(len(self.lengths)))
        shuffled = chosen[np.argsort(draws[chosen], kind="stable")]
        packed = best_fit_decreasing([self.lengths[n] for n in shuffled], self.config.target_length)
        rows = [sorted((int(shuffled[i]) for i in row), key=lambda n: draws[n]) for row in packed]
        return sorted(rows, key=lambda row: draws[row[0]])

    # Writing

    def _write(self, rows: list[list[int]]) -> None:
        tokens = np.memmap(self.out / SPOOL[0], np.int32, "r")
        begins = 2 * np.cumsum([0, *self.lengths])
        shard_rows: list[int] = []
        row = counted = visual = 0
        metadata = self.plan.provenance.to_metadata()
        with open(self.out / SPOOL[1], "rb") as spooled:
            while row < len(rows):
                ids, labels, lines, offsets, samples, starts = [], [], [], [0], [0], []
                first = row
                while row < len(rows) and offsets[-1] < self.config.shard_tokens:
                    at = 0
                    for number in rows[row]:
                        length = self.lengths[number]
                        both = tokens[begins[number] : begins[number + 1]].reshape(2, length)
                        ids.append(both[0])
                        labels.append(both[1])
                        spooled.seek(self.lines_at[number])
                        line = json.loads(spooled.read(self.lines_at[number + 1] - self.lines_at[number]))
                        lines.append(_placed(line, row - first, at))
                        visual += sum(item["tokens"] for item in line["media"])
                        starts.append(at)
                        at += length
                    offsets.append(offsets[-1] + at)
                    samples.append(len(starts))
                    row += 1
                tensors = {
                    "input_ids": np.concatenate(ids),
                    "labels": np.concatenate(labels),
                    "row_offsets": np.array(offsets, np.int64),
                    "sample_offsets": np.array(samples, np.int64),
                    "sample_starts": np.array(starts, np.int32),
                }
                counted += int(np.count_nonzero(tensors["labels"] != IGNORED))
                write_chat_shard(self.out, len(shard_rows), tensors, lines, metadata)
                shard_rows.append(row - first)
                self.report(row, len(rows), "rows written")
        del tokens
        packed = np.zeros(len(self.lengths), bool)
        packed[[number for of in rows for number in of]] = True
        with open(self.out / SPOOL[1], "rb") as spooled:
            for number in np.flatnonzero(~packed).tolist():
                spooled.seek(self.lines_at[number])
                line = json.loads(spooled.read(self.lines_at[number + 1] - self.lines_at[number]))
                self.left_out.append({k: line[k] for k in ("source", "kind", "tokens")} | {"why": "not needed"})
        write_lines(self.out / LEFT_OUT, self.left_out)
        names = [name(i) for i in range(len(shard_rows)) for name in (shard_name, lines_name)]
        facts = {"shard_rows": shard_rows, "labels_counted": counted, "visual_tokens": visual}
        write_manifest(self.out, self.plan.provenance, [*names, LEFT_OUT], **self._account(packed, len(rows)), **facts)

    def _account(self, packed: np.ndarray, rows: int) -> dict[str, Any]:
        """What was asked for and what came of it."""
        config, lengths, kinds = self.config, np.array(self.lengths), np.array(self.kinds)
        total, long = int(lengths[packed].sum()), packed & (lengths > config.long_over)
        why = Counter((r["kind"], r["why"] if r["why"] in ("too long", "not needed") else "bad") for r in self.left_out)
        sources = {}
        for kind, share in config.mix.items():
            of = kinds == kind
            sources[kind] = {
                "share_requested": share,
                "share_achieved": int(lengths[packed & of].sum()) / total,
                "samples": sum(why[kind, reason] for reason in ("too long", "bad")) + int(of.sum()),
                "tokens": int(lengths[of].sum()),
                "packed_samples": int((packed & of).sum()),
                "packed": int(lengths[packed & of].sum()),
                "not_needed": why[kind, "not needed"],
                "too_long": why[kind, "too long"],
                "malformed": why[kind, "bad"],
                **_histogram("before", lengths[of]),
                **_histogram("after", lengths[packed & of]),
            }
        return {
            "target_length": config.target_length,
            "rows": rows,
            "tokens": total,
            "fill": total / (rows * config.target_length),
            "samples": int(packed.sum()),
            "long": {
                "over": config.long_over,
                "share_requested": config.long_share,
                "share_achieved": int(lengths[long].sum()) / total,
                "samples": int(long.sum()),
                "share_of_samples": int(long.sum()) / int(packed.sum()),
            },
            "too_long": [r["source"] for r in self.left_out if r["why"] == "too long"][:20],
            "length_bins": bin_names(),
            "sources": sources,
        }


def _histogram(when: str, lengths: np.ndarray) -> dict[str, list[int]]:
    bins = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(bins, minlength=BINS), np.bincount(bins, weights=lengths, minlength=BINS)
    return {f"{when}_samples": counts[0].tolist(), f"{when}_tokens": counts[1].astype(int).tolist()}


def _placed(line: dict[str, Any], row: int, start: int) -> dict[str, Any]:
    """A sample's line with its place in the row."""
    for item in line["media"]:
        item["at"] += start
        for block in item["blocks"]:
            block[0] += start
    return {"source": line["source"], "kind": line["kind"], "row": row, "start": start, **line}
