"""Training curves in TensorBoard or Weights & Biases; each is an extra of the same name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lvctx.cli.output import is_rank_zero
from lvctx.errors import MissingError
from lvctx.training.parallel_config import OnStep


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Trackers for training curves."""

    panel: ClassVar[str] = "Run"

    log: Literal["tensorboard", "wandb"] | None = None
    """Tracker for training curves, in addition to metrics.jsonl."""


Send = Callable[[dict[str, float], int], None]


@contextmanager
def tracker(options: TrackingOptions, out: Path) -> Iterator[OnStep]:
    """A function that sends a row of metrics.jsonl to the chosen tracker.

    The curves of a stage have its directory as prefix. Raises MissingError without the extra.
    """
    if options.log is None or not is_rank_zero():
        yield lambda folder, row: None
        return
    send, close = (_tensorboard if options.log == "tensorboard" else _wandb)(out)

    def send_row(directory: Path, row: dict[str, Any]) -> None:
        folder = directory.relative_to(out).as_posix()
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        values |= {f"lr_{group}": rate for group, rate in row["lr"].items()}
        send({k if folder == "." else f"{folder}/{k}": v for k, v in values.items()}, row["step"])

    try:
        yield send_row
    finally:
        close()


def _tensorboard(out: Path) -> tuple[Send, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingError("tensorboard is not installed", fix="pip install 'lvctx[tensorboard]'") from None
    writer = SummaryWriter(out / "tensorboard")

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(out: Path) -> tuple[Send, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise MissingError("wandb is not installed", fix="pip install 'lvctx[wandb]'") from None
    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="lvctx", name=out.name, dir=out)
    return lambda values, step: run.log({**values, "step": step}), run.finish
