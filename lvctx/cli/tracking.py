"""Training curves elsewhere than in metrics.jsonl: TensorBoard or Weights & Biases, each an extra of its own name."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from lvctx.cli.common import Report, is_rank_zero
from lvctx.errors import MissingError


class Tracker(StrEnum):
    """Where curves go."""

    tensorboard = "tensorboard"
    wandb = "wandb"


@contextmanager
def tracked(report: Report, tracker: Tracker | None, out: Path) -> Iterator[Report]:
    """`report`, which from then on also sends the row of metrics.jsonl that was written before it was called.

    A stage's curves carry its folder's name. Raises MissingError without the extra.
    """
    if tracker is None or not is_rank_zero():
        yield report
        return
    send, close = (_tensorboard if tracker is Tracker.tensorboard else _wandb)(out)

    def told(done: int, total: int, note: str) -> None:
        report(done, total, note)
        files = sorted(out.rglob("metrics.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        row = json.loads(files[-1].read_bytes().rstrip(b"\n").rpartition(b"\n")[2])
        folder = files[-1].parent.relative_to(out).as_posix()
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        values |= {f"lr_{group}": rate for group, rate in row["lr"].items()}
        send({k if folder == "." else f"{folder}/{k}": v for k, v in values.items()}, row["step"])

    try:
        yield told
    finally:
        close()


Send = Callable[[dict[str, float], int], None]


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
