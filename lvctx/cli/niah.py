"""`lvctx niah`: needles in a haystack of text or video, and `lvctx niah report`: their heatmaps and tables."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    VIDEO,
    AllowPartialOption,
    DryRunOption,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    SeedOption,
    VerboseOption,
    emit,
    examples,
    numbers,
    progress,
)
from lvctx.cli.niah_haystack import haystack as make_haystack
from lvctx.cli.niah_report import ThresholdOption, print_tables, report
from lvctx.cli.vqa import HybridMode, QwenOptions
from lvctx.errors import EXIT_SAMPLES_FAILED, UsageError


class Modality(StrEnum):
    """What the haystack is made of."""

    text = "text"
    video = "video"


class TaskChoice(StrEnum):
    """What is hidden in a text."""

    single = "single"
    multi_key = "multi-key"
    multi_value = "multi-value"
    multi_query = "multi-query"
    variable_tracking = "variable-tracking"


class QuestionChoice(StrEnum):
    """What is asked about a picture."""

    what = "what"
    when = "when"


class KvChoice(StrEnum):
    """Where keys and values are kept."""

    device = "device"
    host = "host"
    int8 = "int8"


class Scoring(StrEnum):
    """How an answer is judged."""

    forced = "forced"
    generate = "generate"
    both = "both"


DEPTHS = "0,0.2,0.4,0.6,0.8,1"
"""LongVA's."""


def register(app: typer.Typer) -> None:
    """Add the command, its `haystack` and its `report` to the program."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(niah)
    group.command(
        "report", epilog=examples("lvctx niah report niah", "lvctx niah report niah niah -o both.png --json")
    )(report)
    group.command(
        "haystack",
        epilog=examples(
            "lvctx niah haystack --frames 20 --model vlm -o hay.frames.safetensors",
            "lvctx niah haystack clips/bikes.mp4 --frames 20 --seed 1 -o hay-pictures",
        ),
    )(make_haystack)
    app.add_typer(
        group,
        name="niah",
        rich_help_panel=VIDEO,
        epilog=examples(
            "lvctx niah --model lm --modality text --haystack essays --lengths 256 --depths 0,1 --trials 1 -o needles",
            "lvctx niah report niah -o heatmap.png",
        ),
    )


def niah(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="Language model or VLM: directory or hub id.")] = None,
    modality: Annotated[Modality, typer.Option(help="Haystack of text or of video frames.")] = Modality.video,
    haystack: Annotated[list[Path] | None, typer.Option(help="Text: files or folders; repeat for more.")] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option(help="Video: frames artifacts (Qwen-VL: video files, folders of pictures), one after the other."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens in all (text) or haystack frames (video), comma-separated.")
    ] = "",
    depths: Annotated[
        str,
        typer.Option(help="Where the needle goes, 0 to 1, comma-separated; nested[:...]: points all lengths share."),
    ] = DEPTHS,
    trials: Annotated[int, typer.Option(help="Needles a cell.", min=1)] = 5,
    distractors: Annotated[int, typer.Option(help="Look-alike needles in the haystack.", min=0, max=20)] = 0,
    needles: Annotated[str, typer.Option(help="Video: drawn, or a folder with images and one .jsonl.")] = "drawn",
    question: Annotated[
        QuestionChoice, typer.Option(help="Video: what the needle shows, or at which second.")
    ] = QuestionChoice.what,
    tolerance: Annotated[float, typer.Option(help="Seconds that the answer to when may be off.", min=0)] = 2.0,
    task: Annotated[TaskChoice, typer.Option(help="Text: what is hidden (RULER's kinds).")] = TaskChoice.single,
    count: Annotated[int, typer.Option(help="Keys, values, queries or hops of --task.", min=2, max=10)] = 4,
    loop: Annotated[bool, typer.Option(help="Repeat a haystack shorter than a length.")] = False,
    score: Annotated[
        Scoring | None,
        typer.Option(
            help="Teacher forcing, greedy generation, or both.", show_default="forced; generate for lists and when"
        ),
    ] = None,
    training_length: Annotated[
        int | None, typer.Option(help="Tokens the LM was trained on (the heatmap's line). Default: as it says.", min=1)
    ] = None,
    rope_theta: Annotated[
        str | None, typer.Option(help="Try RoPE bases without training: comma-separated; each in a folder of -o.")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(help="Likewise, other positions: pi, ntk or yarn and a factor, as in yarn:2,yarn:4.")
    ] = None,
    threshold: ThresholdOption = 0.9,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second of a video file.", min=0.001, rich_help_panel=QwenOptions, show_default="1"),
    ] = None,
    hybrid: Annotated[
        str | None,
        typer.Option(
            metavar="L,M,S",
            help="Of every L frames one of M tokens, the others of M/S.",
            show_default="1,240,1",
            rich_help_panel=QwenOptions,
        ),
    ] = None,
    hybrid_mode: Annotated[
        HybridMode, typer.Option(help="Groups of merged pairs, or of images.", rich_help_panel=QwenOptions)
    ] = HybridMode.pair,
    allow_partial: AllowPartialOption = False,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Pictures apart, as in Visual Haystacks: no film.", rich_help_panel=QwenOptions),
    ] = False,
    chunk: Annotated[int, typer.Option(help="Tokens of one forward (memory).", min=1)] = 2048,
    reuse: Annotated[bool, typer.Option(help="Compute what cells share once.")] = True,
    kv: Annotated[
        KvChoice, typer.Option(help="Keys and values: on the device, on the host, or in 8 bits (not exact).")
    ] = KvChoice.device,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Results directory.")] = None,
    cp: Annotated[
        int,
        typer.Option(
            help="Processes that read together, each with a part of the KV cache and all weights (torchrun).",
            min=1,
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hide a needle at every depth of ever longer haystacks, and ask for it. One JSON line a cell."""
    if ctx.invoked_subcommand is not None:
        return
    if model is None or out is None or not lengths:
        raise UsageError("--model, --lengths and -o are needed", fix="see lvctx niah --help")
    if allow_partial and modality is Modality.text:
        raise UsageError("--allow-partial is for a haystack of video", fix="drop it")
    hay = haystack if modality is Modality.text else frames
    if not hay:
        raise UsageError(
            "--haystack is needed for text" if modality is Modality.text else "--frames is needed for video"
        )
    nested = depths == "nested" or depths.startswith("nested:")
    listed = (depths.partition(":")[2] or DEPTHS) if nested else depths
    depths_wanted, lengths_wanted = numbers("--depths", listed), numbers("--lengths", lengths)
    if any(n != int(n) for n in lengths_wanted):
        raise UsageError(f"--lengths {lengths!r}: whole numbers are wanted")

    from lvctx.bench.grid import read_grid
    from lvctx.bench.heatmap import draw_heatmaps
    from lvctx.stages.niah import SHARED_WORK_TIMEOUT, NiahConfig, open_context, plan_niah, run_niah
    from lvctx.stages.qwen_asker import resolution

    config = NiahConfig(
        model=model,
        modality=modality.value,
        haystack=tuple(hay),
        lengths=tuple(int(n) for n in lengths_wanted),
        depths=tuple(depths_wanted),
        trials=trials,
        distractors=distractors,
        needles=needles,
        scoring=score.value if score else None,
        training_length=training_length,
        seed=seed,
        nested=nested,
        loop=loop,
        task=task.value,
        count=count,
        question=question.value,
        tolerance=tolerance,
        kept=kv.value,
        fps=fps,
        hybrid=resolution(hybrid, hybrid_mode.value),
        apart=apart,
        allow_partial=allow_partial,
    )
    tried = [("theta", theta) for theta in (numbers("--rope-theta", rope_theta) if rope_theta else [])]
    for one in rope.split(",") if rope else []:
        scheme, _, number = one.strip().partition(":")
        tried += [(scheme, factor) for factor in numbers("--rope", number)]
    plans = {out / f"{scheme}-{n:g}": plan_niah(replace(config, rope=(scheme, n))) for scheme, n in tried}
    plans = plans or {out: plan_niah(config)}
    if dry_run:
        for target, plan in plans.items():
            emit({"dry_run": True, "path": str(target), **plan.shown, **plan.facts(cp)})
        return
    failed = 0
    opened = open_context(device=device, cp=cp, timeout=SHARED_WORK_TIMEOUT)
    with opened as world, progress(f"niah {modality.value}", quiet=quiet) as tell:
        for target, plan in plans.items():
            for row in run_niah(
                plan,
                target,
                world=world,
                chunk=chunk,
                reuse=reuse,
                resume=resume.value,
                force=force,
                report=tell,
                threshold=threshold,
            ):
                failed += "error" in row
                emit(row)
        failed = max(world.gather(failed))
    if world.rank == 0:
        grids = [read_grid(target) for target in plans]
        if tried:
            draw_heatmaps(grids, out / "heatmap.png", threshold=threshold)
        if not quiet:
            print_tables(grids, threshold=threshold, stderr=True)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)
