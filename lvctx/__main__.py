"""`python -m lvctx` and the `lvctx` script: the same program, also what torchrun launches."""


def main() -> None:
    """Run the command line."""
    from lvctx.cli.app import app

    app()


if __name__ == "__main__":
    main()
