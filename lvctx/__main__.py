"""`python -m lvctx` and the `lvctx` script: the same program, also what torchrun launches."""

import gc
import os
import warnings


def main() -> None:
    """Run the command line."""
    # Libraries draw bars and print advice of their own on stderr; ours is for the user's progress and errors.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # What is imported lives as long as the program: garbage collection of it only delays the first line of output.
    gc.disable()
    from lvctx.cli.app import app

    gc.freeze()
    gc.enable()
    app()


if __name__ == "__main__":
    main()
