"""A tokenizer as one JSON text that any process can load, and the token that separates documents.

It is read with the `tokenizers` library alone if there is a `tokenizer.json`; transformers (and with it torch) is
imported only to convert a tokenizer without one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lvctx.artifacts.bounded import read_utf8
from lvctx.artifacts.store import read_json
from lvctx.errors import InputError, library_errors


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
    """The same token as text."""
    vocabulary: int
    """Number of ids."""


def find_tokenizer(name: str, separator: str) -> TokenizerFile:
    """Load a tokenizer from a model directory, a tokenizer.json or the hub, and resolve its separator.

    `separator` is `auto` (bos, else <|endoftext|>, else eos), a token or an id. Raises InputError for an unknown one.
    """
    from tokenizers import Tokenizer

    content, special = _read_tokenizer(name)
    with library_errors("not a tokenizer", where=name):
        tokenizer = Tokenizer.from_str(content)
    vocabulary = tokenizer.get_vocab_size()
    if separator.isdigit():
        number = int(separator)
        if tokenizer.id_to_token(number) is None:
            raise InputError(f"no token {number} (it has {vocabulary})", where=name, fix="choose another --separator")
    else:
        candidates = (special.get("bos_token"), "<|endoftext|>", special.get("eos_token"))
        names = [c for c in candidates if c] if separator == "auto" else [separator]
        ids = [i for i in map(tokenizer.token_to_id, names) if i is not None]
        if not ids:
            what = "no bos, <|endoftext|> or eos token" if separator == "auto" else f"no token {separator!r}"
            raise InputError(what, where=name, fix="give --separator an existing token or id")
        number = ids[0]
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
        return read_utf8(path / "tokenizer.json"), _special_tokens(path)
    if not path.is_dir() and not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        from huggingface_hub import snapshot_download

        files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        with library_errors("neither a local directory nor a downloadable model", where=name):
            path = Path(snapshot_download(name, allow_patterns=files))
        if (path / "tokenizer.json").is_file():
            return read_utf8(path / "tokenizer.json"), _special_tokens(path)
    elif not path.is_dir():
        raise InputError("no such tokenizer", where=name, fix="give --tokenizer a model directory or a hub id")
    return _convert(name)


def _special_tokens(path: Path) -> dict[str, str]:
    special: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / file).is_file():
            stored = read_json(path / file)
            for key in ("bos_token", "eos_token"):
                token = stored.get(key)
                if token:
                    special[key] = token["content"] if isinstance(token, dict) else token
    return special


def _convert(name: str) -> tuple[str, dict[str, str]]:
    """Convert a tokenizer without tokenizer.json (SentencePiece, vocab and merges) with transformers."""
    from transformers import AutoTokenizer

    with library_errors("no tokenizer.json, and transformers cannot load a tokenizer either", where=name):
        stock = AutoTokenizer.from_pretrained(name)
    if not stock.is_fast:
        raise InputError("its tokenizer has no fast version", where=name, fix="convert it to tokenizer.json")
    special = {k: str(v) for k, v in stock.special_tokens_map.items() if k in ("bos_token", "eos_token")}
    return stock.backend_tokenizer.to_str(), special
