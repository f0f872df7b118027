"""`python -m lvctx` and the `lvctx` script: the same program, also what torchrun launches."""

import gc
import os
import sys
import threading
import warnings

UNFINISHED = "lvctx-unfinished"
"""`THREAD_NAME` of `inference/concurrency.py`, which is not imported for a help."""


def main() -> None:
    """Run the command line."""
    # Libraries print progress bars and advice on stderr; stderr is for the user's progress and errors.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Imported objects live as long as the program: collecting garbage among them only delays the first line of output.
    gc.disable()
    from lvctx.cli.app import app

    gc.freeze()
    gc.enable()
    try:
        app()
    except SystemExit as e:
        # A thread that still waits for a server would be ended in the middle of native code, which may abort.
        if isinstance(e.code, int) and any(thread.name == UNFINISHED for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(e.code)
        raise


if __name__ == "__main__":
    main()
