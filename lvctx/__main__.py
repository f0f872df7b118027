"""`python -m lvctx` and the `lvctx` script: the same program, also what torchrun launches."""

import gc
import os
import warnings


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
    app()


if __name__ == "__main__":
    main()
