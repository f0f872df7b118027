"""Errors caused by the user's input. Each is one line (what, where, what to do) and has the exit code of its kind.

All of them derive from `ValueError`, so library users can catch what they expect; any other exception that escapes
is a bug of ours and exits 1 with its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_SAMPLES_FAILED = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141


class LvctxError(ValueError):
    """Base of every error a user can cause. `where` names a file, row or flag; `fix` is how to correct it."""

    exit_code = 3

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where is not None else what
        super().__init__(" ".join(f"{line}; {fix}".split()) if fix else " ".join(line.split()))


class UsageError(LvctxError):
    """Flags that contradict each other, or a value out of range."""

    exit_code = 2


class InputError(LvctxError):
    """A file, row, model or artifact that cannot be used as it is."""

    exit_code = 3


class OutOfMemory(InputError):
    """The device or the host has too little memory for an input; a smaller one may fit."""


class DiskError(InputError):
    """The file system refuses a write: no further sample can be stored either."""


class MissingError(LvctxError):
    """An optional package or a piece of hardware that this command needs and that is missing."""

    exit_code = 5


class Stopped(BaseException):
    """SIGTERM arrived: state is saved and the same command line continues from there (exit 75).

    Derives from `BaseException`, like `KeyboardInterrupt`: no `except Exception` of ours or of a library may catch it.
    """


LESS_MEMORY = "use shorter inputs or smaller batches; `lvctx plan` predicts a training's memory"


@contextmanager
def memory_errors(*, where: object = None, fix: str = LESS_MEMORY) -> Iterator[None]:
    """Turn what Python and torch raise when memory is used up into OutOfMemory."""
    try:
        yield
    except OutOfMemory as e:
        raise OutOfMemory(e.what, where=where if e.where is None else e.where, fix=e.fix or fix) from e.__cause__
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        raise OutOfMemory(f"out of memory ({first_line(e)})", where=where, fix=fix) from e


def _is_out_of_memory(e: BaseException) -> bool:
    """On a CPU and within cuBLAS, torch raises RuntimeError, which only its text tells from others."""
    words = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "create a memory object")
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or any(word in str(e) for word in words)


@contextmanager
def library_errors(what: str, *, where: object = None, fix: str = "") -> Iterator[None]:
    """Turn any exception that a library raises while it reads a user's file into an InputError: `where: what (reason)`.

    transformers, tokenizers and jinja raise exceptions of any type on an unexpected file (TypeError, KeyError,
    AssertionError, their own validation errors, a panic of Rust code), so there is no list of types. The body has to
    be the library's call alone: a mistake in our own code must remain a traceback. A package that is not installed is a
    MissingError; too little memory is OutOfMemory.
    """
    try:
        with memory_errors(where=where):
            yield
    except LvctxError:
        raise
    except ImportError as e:
        raise MissingError(f"{what} ({first_line(e)})", where=where, fix=fix) from e
    except Exception as e:
        raise InputError(f"{what} ({first_line(e)})", where=where, fix=fix) from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # raised by Rust code; neither an Exception nor an importable class
            raise
        raise InputError(f"{what} ({first_line(e)})", where=where, fix=fix) from e


def first_line(e: BaseException) -> str:
    """An exception in a few words: the start of its text, after its type if the text alone is unclear."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(":")
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return text if " " in text and not isinstance(e, KeyError) else f"{type(e).__name__} {text}".strip()
