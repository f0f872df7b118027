"""Tokenizing chunks in other processes, in order: mainly the tokenizers library's batch call.

A worker gets raw chunks, parses and decodes them, and returns one int32 array of all their tokens, with the separator
before each document, so that the packing process only copies.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lvctx.data.document_fields import UNNAMED, Fields, dig
from lvctx.data.documents import Chunk
from lvctx.data.row_groups import RowGroupReader
from lvctx.data.tokenizer import TokenizerFile
from lvctx.errors import InputError

OK, REPAIRED, SKIPPED, MALFORMED = 0, 1, 2, 3
"""Status of a document: read, read with invalid UTF-8 replaced, left out for it, or a malformed record."""

UNREADABLE = "unreadable"
"""The source of documents that were left out before their source was known."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized chunk. N documents; document i is `ids[starts[i]:starts[i + 1]]`, the separator first."""

    chunk: Chunk
    """The chunk that it came from, without content."""
    ids: np.ndarray
    """int32, all documents one after another."""
    starts: np.ndarray
    """int64 (N + 1,)."""
    status: np.ndarray
    """uint8 (N,): OK, REPAIRED, SKIPPED or MALFORMED; the last two have no tokens."""
    names: tuple[str, ...]
    """Sources in this chunk."""
    codes: np.ndarray
    """int32 (N,): index into `names`."""

    def lengths(self) -> np.ndarray:
        """Tokens of each document without the separator, int64 (N,)."""
        return np.diff(self.starts) - 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How to handle invalid input."""

    invalid: str = "replace"
    """Invalid UTF-8: `replace` with U+FFFD, `skip` the document, or `error`."""
    skip_malformed: bool = False
    """Leave malformed records out and count them, instead of stopping at the first."""


class Encoder:
    """A loaded tokenizer that turns chunks into tokens."""

    def __init__(self, content: str, *, separator: int, fields: Fields, policy: Policy) -> None:
        """`content` is the JSON of `tokenizers`; its truncation and padding are switched off.

        Special tokens and the separator inside a document are encoded like any other text.
        """
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.separator, self.fields, self.policy = separator, fields, policy
        self._row_groups = RowGroupReader(fields)
        added = self.tokenizer.get_added_tokens_decoder()
        if separator in added:
            self.tokenizer.add_special_tokens([added[separator]])
        self.tokenizer.encode_special_tokens = True
        special = {i: token.content for i, token in added.items() if token.special}
        unknown = set(self._ids("\ufdd0"))  # a character in no vocabulary
        self._leaks = {i for i, text in special.items() if i in self._ids(text)} - unknown
        """Special tokens that are also pieces of the vocabulary (Unigram), which cannot be encoded as text."""

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, chunk: Chunk) -> Tokens:
        """Tokenize a chunk. Raises InputError naming the invalid line or file."""
        texts, sources, status, numbers = self._parse(chunk) if chunk.lines is not None else self._decode(chunk)
        starts = np.zeros(len(texts) + 1, np.int64)
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate, which JSON can encode and UTF-8 cannot
            texts = [self._without_surrogates(t, chunk, numbers[i], i, status) for i, t in enumerate(texts)]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for i, encoding in enumerate(encodings) if self._leaks else ():
            for token in sorted(self._leaks.intersection(encoding.ids))[:1]:
                what = f"{self.tokenizer.id_to_token(token)} in the text, which this tokenizer cannot encode as text"
                texts[i], status[i] = self._malformed(what, chunk, numbers[i])
                encodings[i] = self.tokenizer.encode("", add_special_tokens=False)
        np.cumsum([len(e) + 1 for e in encodings], out=starts[1:])
        ids = np.empty(starts[-1], np.int32)
        for start, encoding in zip(starts.tolist(), encodings, strict=False):
            ids[start] = self.separator
            ids[start + 1 : start + 1 + len(encoding)] = np.fromiter(encoding.ids, np.int32, len(encoding))
        sources = [UNREADABLE if bad in (SKIPPED, MALFORMED) else s for s, bad in zip(sources, status, strict=True)]
        names: dict[str, int] = {}
        codes = np.fromiter((names.setdefault(s, len(names)) for s in sources), np.int32, len(sources))
        without_text = replace(chunk, lines=None, texts=(), sources=())
        state = np.array(status, np.uint8)
        return Tokens(chunk=without_text, ids=ids, starts=starts, status=state, names=tuple(names), codes=codes)

    def _decode(self, chunk: Chunk) -> tuple[list[str], list[str], list[int], list[int]]:
        found, sources = list(chunk.texts), list(chunk.sources)
        if chunk.span:
            rows = self._row_groups.read(chunk.where, chunk.span)
            found, sources = [dig(row, self.fields.text) for row in rows], [self.fields.source_of(row) for row in rows]
        texts, status = [], []
        for number, text in enumerate(found):
            state = OK
            if isinstance(text, bytes):
                text, state = self._to_text(text, chunk, number)
            elif text is None:
                text, state = self._malformed("the text is null", chunk, number)
            elif not isinstance(text, str):
                raise InputError(f"the text is {type(text).__name__}, not a string", where=chunk.name(number))
            texts.append(text)
            status.append(state)
        return texts, sources, status, list(range(len(texts)))

    def _parse(self, chunk: Chunk) -> tuple[list[str], list[str], list[int], list[int]]:
        """Texts, sources, the status of each, and its line in the chunk, from 0."""
        blob = chunk.lines or b""
        if chunk.start.at == 0:
            blob = blob.removeprefix(b"\xef\xbb\xbf")
        lines: list[Any] = []
        try:
            lines += blob.decode().split("\n")
        except UnicodeDecodeError:
            lines += blob.split(b"\n")
        texts, sources, status, numbers = [], [], [], []
        for number, line in enumerate(lines):
            if not line or line.isspace():
                continue
            state = OK
            if isinstance(line, bytes):
                line, state = self._to_text(line, chunk, number)
                if state == SKIPPED:
                    line = "{}"
            text, source, wrong = "", UNNAMED, ""
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                wrong = f"malformed JSON ({e})"
            else:
                value = record.get(self.fields.text) if isinstance(record, dict) else None
                if value is None:
                    value = dig(record, self.fields.text)
                if isinstance(value, str):
                    text, source = value, self.fields.source_of(record)
                    if source == UNNAMED and self.fields.source:
                        wrong = f"no field {self.fields.source!r} (it has {', '.join(record)})"
                elif state != SKIPPED:
                    wrong = self._no_text(record)
            if wrong:
                text, state = self._malformed(wrong, chunk, number)
            texts.append(text)
            sources.append(source)
            status.append(state)
            numbers.append(number)
        return texts, sources, status, numbers

    def _no_text(self, record: Any) -> str:
        if isinstance(record, list):
            return "a JSON array instead of one object per line"
        if not isinstance(record, dict):
            return "not a JSON object"
        if self.fields.text.split(".")[0] in record:
            return f"field {self.fields.text!r} is not a string"
        return f"no field {self.fields.text!r} (it has {', '.join(map(str, record)) or 'none'})"

    def _malformed(self, what: str, chunk: Chunk, number: int) -> tuple[str, int]:
        if self.policy.skip_malformed:
            return "", MALFORMED
        raise InputError(what, where=chunk.name(number), fix="correct it, or --skip-malformed")

    def _to_text(self, raw: bytes, chunk: Chunk, number: int) -> tuple[str, int]:
        try:
            return raw.decode(), OK
        except UnicodeDecodeError as e:
            if self.policy.invalid == "error":
                raise InputError(f"invalid UTF-8 at byte {e.start}", where=chunk.name(number)) from e
            return ("", SKIPPED) if self.policy.invalid == "skip" else (raw.decode(errors="replace"), REPAIRED)

    def _without_surrogates(self, text: str, chunk: Chunk, number: int, i: int, status: list[int]) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            text, status[i] = self._to_text(text.encode(errors="surrogatepass"), chunk, number)
        return text


_encoder: Encoder | None = None


def _start(content: str, options: dict[str, Any]) -> None:
    """Initialise a worker: one thread, Ctrl-C ignored (the parent handles it), and exit when the parent exits."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _encoder = Encoder(content, **options)


def _leave_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> Tokens:
    assert _encoder is not None
    return _encoder.encode(chunk)


def tokenize(
    chunks: Iterable[Chunk], tokenizer: TokenizerFile, *, fields: Fields, policy: Policy, workers: int
) -> Generator[Tokens, None, None]:
    """Tokenize chunks in `workers` processes; results are in the order of chunks, at most a few chunks ahead.

    Raises InputError for an invalid document, and if a worker dies.
    """
    options = {"separator": tokenizer.separator, "fields": fields, "policy": policy}
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer.content, options)
    )
    waiting: deque[Future[Tokens]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= 2 * workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        raise InputError(
            "a tokenizing process died (out of memory?)", fix="use fewer --workers; run again to continue"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
