"""The errors a user can meet. Each is one line (what, where, what to do) and knows the exit code of the contract.

Everything here derives from `ValueError`, so library users can catch what they expect; anything else that escapes
is a bug of ours and exits 1 with its traceback.
"""

EXIT_SAMPLES_FAILED = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141


class LvctxError(ValueError):
    """Base of every error a user can cause. `where` names a file, row or flag; `fix` says what to do about it."""

    exit_code = 3

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where is not None else what
        super().__init__(" ".join(f"{line}; {fix}".split()) if fix else " ".join(line.split()))


class UsageError(LvctxError):
    """Flags that contradict each other or a value out of its range."""

    exit_code = 2


class InputError(LvctxError):
    """A file, row, model or artifact that cannot be used as it is."""

    exit_code = 3


class MissingError(LvctxError):
    """An optional package or a piece of hardware that this command needs and does not find."""

    exit_code = 5


class Stopped(BaseException):
    """SIGTERM arrived: state is saved and the same command line goes on from there (exit 75).

    Derives from `BaseException`, like `KeyboardInterrupt`: no `except Exception` of ours or of a library may eat it.
    """
