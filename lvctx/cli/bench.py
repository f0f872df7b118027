"""`lvctx bench NAME run|score`: other benchmarks of long video on the engine of `videomme`."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

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
    progress,
    say,
)
from lvctx.cli.encode_video import FrameModeChoice, parse_rate
from lvctx.cli.vqa import DeviceMapOption, HybridMode, parse_device_map
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, UsageError

NAMES = {
    "mlvu": "MLVU: nine tasks on long videos; generation tasks are exported for a judge.",
    "longvideobench": "LongVideoBench: referred reasoning; a random letter where none is read.",
    "nextqa": "NExT-QA, multiple choice: causal, temporal, descriptive.",
    "vhs": "Visual Haystacks, single needle: yes or no about one picture among many.",
}


def register(app: typer.Typer) -> None:
    """Add the command's groups to the program."""
    group = typer.Typer(no_args_is_help=True, help="Other benchmarks of long video: run a model on them, and score it.")
    for name, what in NAMES.items():
        one = typer.Typer(no_args_is_help=True, help=what)
        one.command("run")(runner(name))
        one.command("score")(scorer(name))
        group.add_typer(one, name=name)
    app.add_typer(
        group,
        name="bench",
        rich_help_panel=VIDEO,
        epilog=examples(
            "lvctx bench nextqa run --model vlm --videos clips --questions nextqa.csv --frames 4 -o nextqa",
            "lvctx bench nextqa score nextqa",
        ),
    )


def load(name: str) -> ModuleType:
    """A benchmark: one module of `bench`."""
    return import_module(f"lvctx.bench.{name}")


def runner(name: str) -> Callable[..., None]:
    """The `run` command of a benchmark."""
    asked_for = "Questions as released: Parquet, JSON, JSONL, CSV, a folder of them, ORG/NAME/FILE of a hub dataset"
    asked_for += ", or hub: lmms-lab/Video-MME." if name == "videomme" else "."

    def run(
        model: Annotated[str, typer.Option(help="VLM: directory or hub id.")],
        videos: Annotated[Path, typer.Option(help="Folder of the videos, or of the pictures.")],
        questions: Annotated[str, typer.Option(metavar="FILE", help=asked_for)],
        out: Annotated[Path, typer.Option("-o", "--out", help="Results directory.")],
        frames: Annotated[
            int | None, typer.Option(help="Frames of a video, evenly spread.", min=1, show_default="128, without --fps")
        ] = None,
        fps: Annotated[str | None, typer.Option(metavar="RATE|native", help="Or this many frames a second.")] = None,
        frame_mode: Annotated[
            FrameModeChoice | None,
            typer.Option(
                help="Square by crop of the centre, pad with the mean colour, or squash.", show_default="crop"
            ),
        ] = None,
        hybrid: Annotated[
            str | None,
            typer.Option(metavar="L,M,S", help="Of every L frames one of M tokens, the others of M/S. Default: all M."),
        ] = None,
        hybrid_mode: Annotated[
            HybridMode, typer.Option(help="Qwen-VL: groups of merged pairs, of images, or of frames.")
        ] = HybridMode.pair,
        allow_partial: AllowPartialOption = False,
        subtitles: Annotated[
            Path | None,
            typer.Option(help="Folder of .srt or .vtt files; only what is said at the sampled frames is shown."),
        ] = None,
        prompt: Annotated[
            str, typer.Option(help="Whose wording: official, or as the help of the command says.")
        ] = "official",
        max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.", min=1)] = 16,
        frames_dir: Annotated[
            Path | None, typer.Option(help="Where the frames artifacts are kept and found.", show_default="OUT/frames")
        ] = None,
        chunk: Annotated[int, typer.Option(help="Tokens of one forward (memory).", min=1)] = 2048,
        reuse: Annotated[bool, typer.Option(help="Read a video's frames once for all its questions.")] = True,
        device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
        device_map: DeviceMapOption = None,
        recipe: RecipeOption = None,
        resume: ResumeOption = Resume.auto,
        force: ForceOption = False,
        dry_run: DryRunOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        rate, spread = parse_rate(fps), parse_device_map(device_map)
        bench = load(name)
        if prompt not in bench.STYLES:
            raise UsageError(f"no prompt {prompt!r}", where="--prompt", fix=f"give one of {', '.join(bench.STYLES)}")
        if subtitles is not None and name != "videomme":
            raise UsageError(f"{name} shows no subtitles", where="--subtitles")
        if rate is not None and frames is not None:
            raise UsageError("give --fps or --frames, not both")
        if name == "vhs" and (rate, frames, frame_mode, hybrid, allow_partial or None) != (None,) * 5:
            raise UsageError("vhs shows pictures, as the model was taught to", fix="drop what is for videos")
        from lvctx.stages.looking import find_look
        from lvctx.stages.questions import AskConfig, plan_questions, run_questions
        from lvctx.stages.qwen_asker import resolution

        config = AskConfig(
            model=model,
            videos=videos,
            questions=_find(bench, questions),
            style=prompt,
            subtitles=subtitles,
            max_new_tokens=max_new_tokens,
        )
        count = 128 if frames is None and rate is None else frames
        look = find_look(
            model,
            fps=rate,
            frames=count,
            frame_mode=frame_mode.value if frame_mode else None,
            hybrid=resolution(hybrid, hybrid_mode.value),
            allow_partial=allow_partial,
            frames_dir=frames_dir or out / "frames",
            device=device,
        )
        plan = plan_questions(bench, config, look)
        if dry_run:
            asked = {"questions": len(plan.samples), "videos": len({s.video for s in plan.samples})}
            emit({"dry_run": True, "path": str(out), **plan.shown, **asked})
            return
        failed: dict[str, str] = {}
        with progress(name, quiet=quiet) as report:
            for row in run_questions(
                plan,
                out,
                device=device,
                device_map=spread,
                chunk=chunk,
                reuse=reuse,
                resume=resume.value,
                force=force,
                report=report,
            ):
                if "error" in row:
                    failed[row["id"]] = row["error"]
                emit(row)
        for error in dict.fromkeys(failed.values()):
            say(f"lvctx: {error}")
        total = len(plan.samples)
        if not quiet or failed:
            say(f"lvctx: {total - len(failed):,} of {total:,} questions answered; scores count these alone")
        if failed:
            raise typer.Exit(EXIT_SAMPLES_FAILED)

    styles = {"videomme": "official, lmms-eval or vlmevalkit", "mlvu": "official or lmms-eval"}
    run.__doc__ = f"""Ask a model the benchmark's questions. One JSON line a question.

    Writes DIR/results.jsonl, from which scores are made, and what the benchmark's own scorer reads. Prompts: \
{styles.get(name, "official")}. A video that is missing or broken is an error row; it is never asked about unseen.
    """
    return run


def _find(bench: ModuleType, questions: str) -> Path:
    """A path, or the file of a dataset on the hub or in its cache: `hub`, ORG/NAME of it, or ORG/NAME/FILE of any."""
    known: tuple[str, str] = getattr(bench, "HUB", ("", ""))
    parts = questions.split("/", 2)
    if questions in ("hub", known[0]) and known[0]:
        repository, file = known
    elif len(parts) < 3 or parts[0] in ("", ".", "..", "~") or Path(questions).exists():
        return Path(questions)
    else:
        repository, file = f"{parts[0]}/{parts[1]}", parts[2]
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # its retries are many lines, and what came of them is one of ours
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as e:  # whatever the hub client raises
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise InputError(
            f"neither here nor a dataset's file that the hub would give ({reason})",
            where=questions,
            fix="check name and network, or download the questions and give the file",
        ) from e


def scorer(name: str) -> Callable[..., None]:
    """The `score` command of a benchmark."""

    def score(
        runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results directories of run.")],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON line a run instead of tables.")] = False,
        seed: SeedOption = 0,
    ) -> None:
        from lvctx.artifacts.schemas import SCORE
        from lvctx.bench.accuracy import read_benchmark_run

        bench = load(name)
        for run in runs:
            read = read_benchmark_run(run, bench)
            found = bench.score(read.rows, seed=seed) if name == "longvideobench" else bench.score(read.rows)
            found["warnings"] = [*read.warnings, *found["warnings"]]
            found = {"schema": SCORE, "bench": name, "run": run.name, "failed": read.failed, **found}
            if as_json:
                emit(found)
            else:
                _print(found)

    score.__doc__ = (
        """Score runs: accuracy with 95% intervals clustered by video, whole and by group. No model, no torch."""
    )
    return score


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names and groups are text of others: [x] and :x: are no markup
    for warning in found["warnings"]:
        console.print(f"WARNING {found['run']}: {warning}", style="bold red", highlight=False)
    left_out = f", {found['failed']:,} failed and left out" if found["failed"] else ""
    console.print(f"{found['run']}: {found['questions']:,} questions{left_out}", highlight=False)
    rules = [rule for rule in found["rules"] if rule != "official-2024"]  # of Video-MME alone; --json has it
    table = Table("", box=None, pad_edge=False)
    for rule in rules:
        table.add_column(f"{rule}, %", justify="right")
    table.add_row("all", *(shown(found["rules"][rule]) for rule in rules))
    for group in (key for key in found if key.startswith("by_")):
        for value, estimates in found[group].items():
            table.add_row(f"{group[3:].replace('_', ' ')}: {value}", *(shown(estimates[rule]) for rule in rules))
    for average in ("macro", "pooled") if "m_avg" in found else ():
        table.add_row(f"M-Avg, {average}", *(percent(found["m_avg"][rule][average]) for rule in rules))
    console.print(table)
    print_sources(console, rules)
    if "guessing" in found:
        own = found["guessing"]
        said = f"its own rule: {shown(own)}, {own['guessed']:,} replies guessed with seed {own['seed']}"
        console.print(said, highlight=False)
    if "effective_length" in found:
        console.print(f"effective length: {found['effective_length']:,} pictures (60% right)", highlight=False)
    if found.get("generated"):
        console.print(f"{found['generated']:,} generated answers, exported for their judge", highlight=False)


def print_sources(console: Any, rules: Iterable[str]) -> None:
    """Say which version of whose scorer each rule is."""
    from lvctx.bench.answers import RULE_SOURCES

    for rule in rules:
        if rule in RULE_SOURCES:
            console.print(f"{rule}: {RULE_SOURCES[rule]}", highlight=False)


def percent(value: float | None) -> str:
    """`61.2`, or a dash where nothing was counted."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(e: dict[str, Any]) -> str:
    """`58.9 to 63.5`, or a dash."""
    return "–" if e["low"] is None else f"{100 * e['low']:.1f} to {100 * e['high']:.1f}"


def shown(e: dict[str, Any]) -> str:
    """`61.2 (58.9 to 63.5; n 2,700)`."""
    return f"{percent(e['mean'])} ({interval(e)}; n {e['counted']:,})"
