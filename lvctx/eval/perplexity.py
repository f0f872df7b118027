"""Perplexity over position: how well a language model predicts the tokens of long rows, by their position in the row.

It is the loss of text training (LongVA's and EasyContext's logged loss and ppl), by position instead of over a batch: a
row is one sequence with positions from 0, and its documents attend to each other. A model without a longer context
predicts worse beyond its own, an extended one better the more it has read.

Shapes: S tokens of a row, L targets (S - 1), C tokens of a chunk, E hidden width, V vocabulary.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lvctx.artifacts import schemas
from lvctx.artifacts.store import atomic_file, fingerprint
from lvctx.config import OnProgress
from lvctx.data.packed import PackedRows
from lvctx.device import resolve_device, weights_dtype
from lvctx.errors import InputError
from lvctx.eval.perplexity_config import PerplexityConfig
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import context_length, load_config, load_model, resolve_model, trained_length, try_forward

log = logging.getLogger(__name__)


def measure_perplexity(config: PerplexityConfig, name: str, on_progress: OnProgress) -> dict[str, Any]:
    """The row of one model. Raises InputError for data that are missing or have ids that the model lacks."""
    path, data = resolve_model(name), PackedRows(config.data, seq_len=config.seq_len)
    rows = min(config.rows, len(data))
    if not rows:
        raise InputError("no rows", where=config.data)
    context = context_length(load_config(path))
    if data.seq_len > context:
        log.warning("%s: %d positions with a model whose config allows %d", name, data.seq_len, context)
    device = resolve_device(config.device)
    model = load_model(path, dtype=weights_dtype(config.dtype, device), device=device)
    try_forward(model, path)
    scorer = PrefixScorer(model, chunk=config.prefill_chunk)
    losses_L = np.zeros(data.seq_len - 1)
    for number in range(rows):
        ids_S = data.row(number)
        if ids_S.max() >= scorer.vocabulary:
            raise InputError(f"token {ids_S.max()} is not in its vocabulary", where=name, fix="pack with its tokenizer")
        losses_L += token_losses(scorer, ids_S) / rows
        on_progress(number + 1, rows, name)
    ends = np.unique(np.linspace(0, len(losses_L), config.points + 1).round().astype(int))
    sums = np.concatenate([[0.0], losses_L.cumsum()])[ends]
    return {
        "schema": schemas.PERPLEXITY,
        "model": name,
        "data": fingerprint(config.data)[:16],
        "rows": rows,
        "seq_len": data.seq_len,
        "trained_length": trained_length(path),
        "perplexity": round(float(np.exp(losses_L.mean())), 4),
        "positions": ends[1:].tolist(),
        "by_position": np.exp(np.diff(sums) / np.diff(ends)).round(4).tolist(),
        "up_to_position": np.exp(sums[1:] / ends[1:]).round(4).tolist(),
    }


@torch.inference_mode()
def token_losses(scorer: PrefixScorer, ids_S: np.ndarray) -> np.ndarray:
    """Cross-entropy (L,) in nats, float64, of each token after the first given those before it."""
    losses, chunks = [], scorer.hidden_states(ids_S[:-1])
    for first, hidden_CE in chunks:
        # Logits of a few tokens at a time: with a large vocabulary they are much larger than the hidden states.
        for begin in range(0, len(hidden_CE), 256):
            logits_CV = scorer.head(hidden_CE[begin : begin + 256]).float()
            targets = ids_S[first + begin + 1 :][: len(logits_CV)].astype(np.int64)
            losses.append(F.cross_entropy(logits_CV, torch.from_numpy(targets).to(logits_CV.device), reduction="none"))
    return torch.cat(losses).double().cpu().numpy()


def draw_perplexity(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw the rows of `measure_perplexity`, a line per model, to a .png or .svg; dotted: the trained lengths."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for row in rows:
        (line,) = ax.plot(row["positions"], row["by_position"], linewidth=1.4, label=row["model"].replace("$", r"\$"))
        if row["trained_length"] < row["seq_len"]:
            ax.axvline(row["trained_length"], color=line.get_color(), linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel("position", fontsize=8)
    ax.set_ylabel("perplexity", fontsize=8)
    ax.tick_params(labelsize=8, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Perplexity by position; dotted: trained length", fontsize=8, loc="left")
    ax.legend(fontsize=7, frameon=False)
    with atomic_file(target) as partial, rc_context({"svg.hashsalt": "lvctx"}):
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:], metadata=metadata)
