"""Commands that show or predict: `info`, `plan` and `doctor`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lvctx.cli.options import OutputOptions, command
from lvctx.cli.output import emit, flatten, progress, say, wants_json
from lvctx.cli.tables import number_table, open_console
from lvctx.config import Flag
from lvctx.errors import InputError, UsageError
from lvctx.training.doctor_config import DoctorConfig
from lvctx.training.plan_config import PlanConfig

MROPE = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
"""Architectures with M-RoPE: `info` shows the wavelengths that transformers computes for them."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """The artifact to show, and how."""

    artifact: Annotated[Path, Flag(argument=True)]
    """A packed or chat directory, frames file, niah directory or model directory."""
    plot: bool = False
    """Plot the document lengths of a packed or chat directory, before and after packing."""
    contact_sheet: Path | None = None
    """Draw the sampled frames of a frames file into this image."""
    video: Annotated[Path | None, Flag(needs=("contact_sheet",))] = None
    """Current path of a frames file's video."""
    verify: bool = False
    """Read the whole artifact and compare it with the hashes that were stored when it was written."""


@command("info", "lvctx info packed --plot", "lvctx info frames/bikes.frames.safetensors --json")
def info(config: InfoConfig, run: OutputOptions) -> None:
    """Show the kind, provenance and content of a model directory or artifact.

    For a vision-language model also how it is evaluated: as video or as images, whether prompts share computation, and
    which commands take it.
    """
    from lvctx.artifacts.describe import describe

    facts = describe(config.artifact)
    if config.verify:
        facts["verified"] = _verify(config.artifact)
    if config.contact_sheet is not None:
        from lvctx.vlm.contact_sheet import contact_sheet

        facts |= contact_sheet(config.artifact, config.contact_sheet, video=config.video)
    if config.plot and "lengths" not in facts:
        raise UsageError("--plot is for packed and chat directories", where=config.artifact)
    positions = None
    model = facts.get("model")
    if isinstance(model, dict) and model.get("architecture") in MROPE:
        from lvctx.training.mrope_verify import verify

        with progress("info", "computing the wavelengths with transformers"):
            positions = verify(config.artifact)
        facts["mrope"] = positions.summary()
    if isinstance(model, dict):
        from lvctx.vlm.registry import evaluation_facts

        facts |= evaluation_facts(config.artifact)
    if wants_json():
        emit(facts)
        return
    from rich.table import Table

    lengths, sources = facts.pop("lengths", {}), facts.pop("sources", {})
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in flatten(facts):
        table.add_row(key, value)
    console = open_console()
    console.print(table)
    if sources:
        # A narrow terminal wraps the lines; rich would truncate names and numbers.
        open_console(width=max(console.width, 160)).print(_source_table(sources))
    if positions is not None:
        from lvctx.cli.train import print_channels

        print_channels(positions, stderr=False)
    if config.plot:
        _plot(lengths, console)


def _verify(artifact: Path) -> str:
    """What was compared with the stored hashes. Raises InputError for damage, and where there are no hashes."""
    from lvctx.artifacts.manifest import verify_files
    from lvctx.vlm.feature_cache import verify_feature_cache

    if artifact.is_file():
        verify_feature_cache(artifact)
        return "all data"
    count = verify_files(artifact, cached=False)
    if not count:
        raise InputError("no hashes to compare with: it has no MANIFEST.json", where=artifact, fix="drop --verify")
    return f"{count} files"


def _source_table(sources: dict[str, Any]) -> Any:
    """Packing statistics, a row per source; columns that are 0 everywhere are left out."""
    columns = [k for k in next(iter(sources.values())) if any(account[k] for account in sources.values())]
    table = number_table("source", (name.replace("_", "\n") for name in columns))
    for source, account in sources.items():
        values = (account[k] for k in columns)
        table.add_row(source, *(f"{v:.4f}" if isinstance(v, float) else f"{v or 0:,}" for v in values))
    return table


def _plot(lengths: dict[str, Any], console: Any) -> None:
    """Share of all tokens that are in documents of each length, before (light) and after (full) packing."""
    totals = {when: sum(counts[f"{when}_tokens"] for counts in lengths.values()) for when in ("before", "after")}
    width = max(20, min(60, console.width - 40))
    console.print("\nshare of tokens by length (tokens):  ░ before  █ after")
    for name, counts in lengths.items():
        unit = next(key for key in counts if key != "before_tokens").removeprefix("before_")
        for when, ink in (("before", "░"), ("after", "█")):
            share = counts[f"{when}_tokens"] / max(totals[when], 1)
            label = name if when == "before" else ""
            bar = f"{ink * round(share * width)} {counts[f'{when}_{unit}']:,} {unit}"
            console.print(f"{label:>17} {share:6.1%} {bar}")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PlanConfig):
    """The training to predict."""

    stage: Annotated[Literal["extend-lm"], Flag(argument=True)]
    """The training command."""


@command(
    "plan",
    "lvctx plan extend-lm --model lm --seq-len 4096 --device cpu",
    "lvctx plan extend-lm --model lm --seq-len 262144 --world 8 --cp 8 --device-memory 80GiB",
)
def plan(config: PlanOptions, run: OutputOptions) -> None:
    """Predict the memory and time of a training run from config.json alone.

    Exits with code 3 if the run does not fit into the devices' memory, and names the flags that would help.
    """
    from lvctx.training.plan import predict, refuse

    prediction = predict(config)
    table = _prediction_table(prediction)
    emit({"stage": config.stage, **prediction}, table)
    if wants_json() and not run.quiet:
        say(table)
    refuse(prediction)


def _prediction_table(prediction: dict[str, Any]) -> str:
    """Memory by part, and time, one per line."""
    gib = 1 << 30
    rows = [(part.replace("_", " "), f"{size / gib:8.2f} GiB") for part, size in prediction["bytes"].items()]
    peak, memory, host = (prediction[key] / gib for key in ("peak_bytes", "device_memory", "host_bytes"))
    rows += [("peak per device", f"{peak:8.2f} GiB of {memory:.0f}"), ("host", f"{host:8.2f} GiB")]
    recomputation = prediction["recomputation"]
    tiles = ", MLPs in tiles" if recomputation["mlp_tiles"] else ""
    rows.append(("recomputed", f"all layers but {recomputation['kept_layers']}{tiles}"))
    full = f"{prediction['longest_with_full_logits']} with full logits"
    rows.append(("longest row that fits", f"{prediction['longest']} tokens ({full})"))
    together = prediction["rows_a_forward"]
    rows.append(("a forward pass", f"{together} x {prediction['seq_len']} tokens"))
    step = f"{prediction['tokens_a_step']} tokens, {prediction['flops_a_step']:.3g} FLOPs"
    if prediction["hours"] is not None:
        step += f", {prediction['seconds_a_step']:.0f} s at {100 * prediction['mfu']:.0f}% MFU"
    rows.append(("a step", step))
    if prediction["hours"] is not None:
        rows.append(("all steps", f"{prediction['hours']} h"))
    return "\n".join(f"{name:>24}  {value}" for name, value in rows)


@command("doctor", "lvctx doctor --model lm --cp 2 --length 101", "lvctx doctor --model lm --cp 1 --length 64")
def doctor(config: DoctorConfig, run: OutputOptions) -> None:
    """Check that context parallelism is exact with a model on this machine.

    Compares the loss and gradients of --cp processes with those of one process, in float32. By default the command
    starts the processes on the CPU; under torchrun it checks the devices that extend-lm would use.
    """
    with progress("doctor", f"computing gradients on 1 and on {config.cp} processes"):
        from lvctx.training.doctor import GRADIENT_TOLERANCE, diagnose

        findings = diagnose(config)
    for f in findings:
        mask = "document mask" if f.doc_mask else "no document mask"
        difference = f"loss differs by {f.loss:.1e}, gradients by at most {f.gradient:.1e} ({f.parameter})"
        row = {"model": config.model, "cp": config.cp, "cp_kind": config.cp_kind, "length": config.length}
        row |= {"exact": f.exact, **asdict(f)}
        emit(row, f"{'exact' if f.exact else 'NOT EXACT'}: {mask}: {difference}")
    if not all(f.exact for f in findings):
        raise InputError(
            f"{config.cp} processes compute other values than one (allowed difference {GRADIENT_TOLERANCE:.0e})",
            where=config.model,
            fix="please report it with the lines above",
        )
