"""Tokenizing chunks in other processes, in order: the tokenizers library's batch call and little else.

A worker gets raw chunks, parses and decodes them, and sends back one int32 array of all their tokens, the separator
already before each document, so that the process that packs only copies. Torch and transformers are not imported,
unless a tokenizer exists in no `tokenizer.json` and has to be converted.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.errors import InputError
from lvctx.text.documents import Chunk, Fields, dig

OK, REPAIRED, SKIPPED, MALFORMED = 0, 1, 2, 3
"""What became of a document: read, read with invalid UTF-8 replaced, left out for it, or not a record at all."""

UNNAMED = "unnamed"
"""The source of documents that name none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer that any process can load."""

    content: str
    """The JSON of `tokenizers`."""
    sha256: str
    """Hex SHA-256 of tokenizer.json."""
    separator: int
    """Token id put before each document."""
    separator_token: str
    """The same as text."""
    vocabulary: int
    """Number of ids."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized chunk. N documents; document i is `ids[starts[i]:starts[i + 1]]`, the separator first."""

    chunk: Chunk
    """Where it came from, without its content."""
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
    """What to do with what is not right."""

    invalid: str = "replace"
    """Invalid UTF-8: `replace` with U+FFFD, `skip` the document, or `error`."""
    skip_malformed: bool = False
    """Leave malformed records out and count them, instead of stopping at the first."""


def find_tokenizer(name: str, separator: str) -> TokenizerFile:
    """Load a tokenizer from a model directory, a tokenizer.json or the hub, and resolve its separator.

    `separator` is `auto` (bos, else <|endoftext|>, else eos), a token or an id. Raises InputError for what is unknown.
    """
    from tokenizers import Tokenizer

    content, special = _read_tokenizer(name)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"not a tokenizer ({e})", where=name) from e
    vocabulary = tokenizer.get_vocab_size()
    if separator.isdigit():
        number = int(separator)
        if tokenizer.id_to_token(number) is None:
            raise InputError(f"no token {number} (it has {vocabulary})", where=name, fix="choose another --separator")
    else:
        candidates = (special.get("bos_token"), "<|endoftext|>", special.get("eos_token"))
        wanted = [c for c in candidates if c] if separator == "auto" else [separator]
        found = [i for i in map(tokenizer.token_to_id, wanted) if i is not None]
        if not found:
            what = "no bos, <|endoftext|> or eos token" if separator == "auto" else f"no token {separator!r}"
            raise InputError(what, where=name, fix="give --separator a token or id that it has")
        number = found[0]
    return TokenizerFile(
        content=content,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        separator=number,
        separator_token=str(tokenizer.id_to_token(number)),
        vocabulary=vocabulary,
    )


def _read_tokenizer(name: str) -> tuple[str, dict[str, str]]:
    path = Path(name)
    if path.is_file():
        path = path.parent
    if (path / "tokenizer.json").is_file():
        return (path / "tokenizer.json").read_bytes().decode(), _special_tokens(path)
    if not path.is_dir() and not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        from huggingface_hub import snapshot_download

        files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        try:
            path = Path(snapshot_download(name, allow_patterns=files))
        except Exception as e:  # whatever the hub client raises
            reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
            raise InputError(f"neither a directory here nor a model the hub gives ({reason})", where=name) from e
        if (path / "tokenizer.json").is_file():
            return (path / "tokenizer.json").read_bytes().decode(), _special_tokens(path)
    elif not path.is_dir():
        raise InputError("no such tokenizer", where=name, fix="--tokenizer takes a model directory or a hub id")
    return _convert(name)


def _special_tokens(path: Path) -> dict[str, str]:
    special: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / file).is_file():
            try:
                stored = json.loads((path / file).read_text(encoding="utf-8"))
            except ValueError as e:
                raise InputError(f"not JSON ({e})", where=path / file) from e
            for key in ("bos_token", "eos_token"):
                token = stored.get(key)
                if token:
                    special[key] = token["content"] if isinstance(token, dict) else token
    return special


def _convert(name: str) -> tuple[str, dict[str, str]]:
    """A tokenizer without tokenizer.json (SentencePiece, vocab and merges), converted by transformers."""
    from transformers import AutoTokenizer

    try:
        stock = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # whatever it raises: there is no list
        raise InputError("no tokenizer.json, and transformers reads no tokenizer there either", where=name) from e
    if not stock.is_fast:
        raise InputError("its tokenizer has no fast form", where=name, fix="convert it to tokenizer.json")
    special = {k: str(v) for k, v in stock.special_tokens_map.items() if k in ("bos_token", "eos_token")}
    return stock.backend_tokenizer.to_str(), special


class Encoder:
    """A loaded tokenizer that turns chunks into tokens."""

    def __init__(self, content: str, *, separator: int, fields: Fields, policy: Policy) -> None:
        """`content` is the JSON of `tokenizers`; its own truncation and padding are switched off."""
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.separator, self.fields, self.policy = separator, fields, policy

    def encode(self, chunk: Chunk) -> Tokens:
        """Tokenize a chunk. Raises InputError naming the line or file that is not right."""
        texts, sources, status = self._parse(chunk) if chunk.lines is not None else self._decode(chunk)
        names: dict[str, int] = {}
        codes = np.fromiter((names.setdefault(s, len(names)) for s in sources), np.int32, len(sources))
        starts = np.zeros(len(texts) + 1, np.int64)
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate, which JSON can spell and UTF-8 cannot
            texts = [self._without_surrogates(t, chunk, i, status) for i, t in enumerate(texts)]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        np.cumsum([len(e) + 1 for e in encodings], out=starts[1:])
        ids = np.empty(starts[-1], np.int32)
        for start, encoding in zip(starts.tolist(), encodings, strict=False):
            ids[start] = self.separator
            ids[start + 1 : start + 1 + len(encoding)] = np.fromiter(encoding.ids, np.int32, len(encoding))
        bare = Chunk(start=chunk.start, end=chunk.end, where=chunk.where)
        state = np.array(status, np.uint8)
        return Tokens(chunk=bare, ids=ids, starts=starts, status=state, names=tuple(names), codes=codes)

    def _decode(self, chunk: Chunk) -> tuple[list[str], list[str], list[int]]:
        texts, status = [], []
        for number, text in enumerate(chunk.texts):
            state = OK
            if isinstance(text, bytes):
                text, state = self._to_text(text, chunk, number)
            elif text is None:
                text, state = self._malformed("the text is null", chunk, number)
            texts.append(text)
            status.append(state)
        return texts, [s or UNNAMED for s in chunk.sources], status

    def _parse(self, chunk: Chunk) -> tuple[list[str], list[str], list[int]]:
        blob = chunk.lines or b""
        if chunk.start.at == 0:
            blob = blob.removeprefix(b"\xef\xbb\xbf")
        lines: list[Any] = []
        try:
            lines += blob.decode().split("\n")
        except UnicodeDecodeError:
            lines += blob.split(b"\n")
        texts, sources, status = [], [], []
        for number, line in enumerate(lines):
            if not line or line.isspace():
                continue
            state = OK
            if isinstance(line, bytes):
                line, state = self._to_text(line, chunk, number)
                if state == SKIPPED:
                    line = "{}"
            text, source, wrong = "", None, ""
            try:
                record = json.loads(line)
            except ValueError as e:
                wrong = f"malformed JSON ({e})"
            else:
                found = record.get(self.fields.text) if isinstance(record, dict) else None
                if found is None:
                    found = dig(record, self.fields.text)
                if isinstance(found, str):
                    text, source = found, self.fields.source_of(record)
                    if source is None and self.fields.source:
                        wrong = f"no field {self.fields.source!r}"
                elif state != SKIPPED:
                    wrong = self._no_text(record)
            if wrong:
                text, state = self._malformed(wrong, chunk, number)
            texts.append(text)
            sources.append(source or UNNAMED)
            status.append(state)
        return texts, sources, status

    def _no_text(self, record: Any) -> str:
        if isinstance(record, list):
            return "a JSON array where one object a line is needed"
        if not isinstance(record, dict):
            return "not a JSON object"
        if self.fields.text.split(".")[0] in record:
            return f"field {self.fields.text!r} is not a string"
        return f"no field {self.fields.text!r} (it has {', '.join(map(str, record)) or 'none'})"

    def _malformed(self, what: str, chunk: Chunk, number: int) -> tuple[str, int]:
        if self.policy.skip_malformed:
            return "", MALFORMED
        raise InputError(what, where=chunk.name(number), fix="mend it, or --skip-malformed")

    def _to_text(self, raw: bytes, chunk: Chunk, number: int) -> tuple[str, int]:
        try:
            return raw.decode(), OK
        except UnicodeDecodeError as e:
            if self.policy.invalid == "error":
                raise InputError(f"invalid UTF-8 at byte {e.start}", where=chunk.name(number)) from e
            return ("", SKIPPED) if self.policy.invalid == "skip" else (raw.decode(errors="replace"), REPAIRED)

    def _without_surrogates(self, text: str, chunk: Chunk, number: int, status: list[int]) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            text, status[number] = self._to_text(text.encode(errors="surrogatepass"), chunk, number)
        return text


_encoder: Encoder | None = None


def _start(content: str, options: dict[str, Any]) -> None:
    """A worker begins: one thread, deaf to Ctrl-C (the parent decides), and gone when the parent is."""
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
    """Tokenize chunks in `workers` processes; results come in the chunks' order, a few chunks ahead at most.

    Raises InputError for a document that is not right, and when a worker dies.
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
            "a tokenizing process died (out of memory?)", fix="use fewer --workers; run again to go on from here"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
