"""`lvctx perplexity`."""

from lvctx.cli.options import OutputOptions, command
from lvctx.cli.output import emit, progress
from lvctx.errors import UsageError
from lvctx.eval.perplexity_config import PerplexityConfig


@command(
    "perplexity",
    "lvctx perplexity lm --data packed --seq-len 256 --rows 1 --points 4",
    "lvctx perplexity lm lm-32k --data packed --rows 1 -o perplexity.png",
)
def perplexity(config: PerplexityConfig, output: OutputOptions) -> None:
    """Perplexity of language models by position in long rows of text.

    One line per model: `by_position` has the perplexity of the tokens between a position and the one before it in
    `positions`, `up_to_position` that of all tokens up to it.
    """
    if config.out is not None and config.out.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {config.out}: the name has to end in .png or .svg")
    rows = []
    with progress("perplexity", "loading the model") as on_progress:
        from lvctx.eval.perplexity import draw_perplexity, measure_perplexity

        for name in config.models:
            rows.append(measure_perplexity(config, name, on_progress))
            emit(rows[-1])
    if config.out is not None:
        draw_perplexity(rows, config.out)
