"""Help and README are correct: examples run, recipes name real flags."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from support import llava_models, mrope_models, warm_server
from transformers import AutoTokenizer

from lvctx.artifacts.store import sha256_file
from lvctx.cli.app import MODULES, load_command
from lvctx.cli.recipes import _recipe_value
from lvctx.eval.benchmarks.benchmark_list import BENCHMARKS

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, Any] = {name: load_command(name) for name in MODULES}
SUBCOMMANDS = {f"{n} {m}": s for n, c in COMMANDS.items() for m, s in getattr(c, "commands", {}).items()}
HELPS = {**COMMANDS, **SUBCOMMANDS}
EXAMPLES = {name: re.findall(r"^lvctx .*|^.*\| lvctx .*", c.epilog or "", re.M) for name, c in HELPS.items()}
GROUPS_SHOW = ("videomme run", *(f"bench {name}" for name in BENCHMARKS))
"""Subcommands that the examples of their group are about."""
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "runtimes.md")]
"""Pages whose commands run; runtimes.md is a table that `make test-runtimes` writes."""

PIPELINES = ROOT / "recipes" / "Makefile"


def shell_commands(page: Path) -> list[str]:
    """The lines of a page's ```sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines()]


def run(command: str, workshop: Path) -> subprocess.CompletedProcess[str]:
    path = f"{warm_server.start().parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=workshop, env=env, capture_output=True, text=True, timeout=300
    )


def check(command: str, workshop: Path) -> str:
    done = run(command, workshop)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_weights_trained_ahead_are_those_whose_hashes_are_written() -> None:
    nano = ROOT / "recipes" / "nano"
    written = dict(reversed(line.split("  ")) for line in (nano / "SHA256SUMS").read_text().splitlines())
    assert written == {str(p.relative_to(ROOT)): sha256_file(p) for p in nano.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def workshop(nano: Any, tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the examples name, made by the commands themselves out of tiny models."""
    here = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_lm, here / "lm")
    shutil.copytree(tiny_tower, here / "tower")
    (here / "essays").mkdir()
    for name in ("love.txt", "avg.txt", "gba.txt"):
        shutil.copy(nano.essays / name, here / "essays")
    (here / "clips").mkdir()
    shutil.copy(nano.clips / "bikes.mp4", here / "clips")
    mrope_models.save("qwen2_vl", here / "qwen2-vl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    lm, tower, projector = llava_models.parts(tokenizer)
    llava_models.write(here / "longva-released", llava_models.tensors_of(lm, tower, projector), lm, tokenizer)
    (here / "videos").mkdir()
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        shutil.copy(nano.clips / name, here / "videos")
    for name in ("questions.json", "nextqa.csv", "squad.json"):
        shutil.copy(ROOT / "tests" / "data" / name, here)
    draw = f"{sys.executable} {ROOT / 'recipes/nano/draw_data.py'} shapes --projector 6 --full 6 --size 48 --workers 1"
    sharded = "lvctx videomme run --model vlm --videos videos --questions questions.json --frames 2"
    for command in (
        f"{draw} && mv shapes/images/* shapes/",
        "lvctx pack-text essays --tokenizer lm --seq-len 1024 --keep-short 1 --separator '<|endoftext|>' -o packed",
        "lvctx extend-lm --model lm --rope-theta 250000 --context 32768 --steps 0 -o lm-32k",
        "lvctx align --lm lm-32k --tower tower --data shapes/projector.json --images shapes --steps 1 --batch 2 -o vlm",
        "lvctx encode-video clips/bikes.mp4 --model vlm --frames 8 -o frames",
        "lvctx niah text --model lm --haystack essays --lengths 256 --depths 0,1 --trials 1 -o niah",
        "lvctx videomme run --model vlm --videos videos --questions questions.json --frames 8 -o videomme",
        f"{sharded} --shard 1/2 -o shard-1",
        f"{sharded} --shard 2/2 -o shard-2",
        "lvctx bench nextqa run --model vlm --videos clips --questions nextqa.csv --frames 4 -o nextqa",
    ):
        check(command, here)
    return here


@pytest.mark.parametrize("name", [name for name in HELPS if name not in GROUPS_SHOW])
def test_every_help_ends_with_two_examples(name: str) -> None:
    assert len(EXAMPLES[name]) == 2


@pytest.mark.nano
@pytest.mark.parametrize("command", [e for examples in EXAMPLES.values() for e in examples])
def test_the_helps_examples_run(command: str, workshop: Path) -> None:
    check(command, workshop)


@pytest.mark.nano
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_of_readme_and_docs_run(page: Path, workshop: Path) -> None:
    commands = shell_commands(page)
    assert len(commands) >= 4
    for command in commands:
        check(command, workshop)


def test_the_table_of_benchmarks_is_the_list() -> None:
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in page.splitlines()
        if row.startswith("| `")
    }
    for name, info in BENCHMARKS.items():
        videos = "" if info.videos is None else f"{info.videos:,}"
        size = [f"{info.questions:,}", videos, info.license, info.dataset]
        assert rows[f"`{name}`"][:-1] == [info.title, *size], name


def test_readme_and_docs_have_commands_and_their_links_lead_somewhere() -> None:
    assert sum(len(shell_commands(page)) for page in PAGES) >= 30
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "recipes").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.nano
def test_the_examples_run(workshop: Path) -> None:
    answers = check(f"{ROOT / 'examples/watch.sh'} vlm clips 'What is on the road?'", workshop)
    assert answers.count('"answer"') == 1
    cells = check(f"{ROOT / 'examples/extend.sh'} lm essays 250000 128,256", workshop)
    assert len(re.findall(r'"correct": (true|false)', cells)) == 2 * 2 * 3
    assert (workshop / "heatmap.png").is_file()


def test_the_tree_of_readme_is_the_one_on_disk() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [p.name for p in (ROOT / "lvctx").iterdir() if p.is_dir() and p.name != "__pycache__"]
    for name in [*folders, "recipes", "examples", "benchmarks", "tests"]:
        assert re.search(rf"^ *{name}/ ", readme, re.M), name
    files = [f"/{p.relative_to(ROOT)}" for p in (ROOT / "lvctx").rglob("*.py")]
    for name in re.findall(r"[\w/]+\.py", readme):
        assert any(file.endswith(f"/{name}") for file in files), name


@pytest.mark.parametrize("target", re.findall(r"^([a-z0-9-]+):(?! [A-Z])", PIPELINES.read_text(), re.MULTILINE))
def test_every_command_of_a_pipeline_has_options_that_exist(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline runs with programs that only write down their arguments, which are then parsed."""
    for name in ("lvctx", "python"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\037" "${0##*/}" "$@" >> commands; echo >> commands\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs/transfer/videos").mkdir(parents=True)
    (tmp_path / "runs/transfer/videos/questions.jsonl").touch()
    # Other files that no program has made are missing, so failures are ignored.
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    make = ["make", "--ignore-errors", "--file", str(PIPELINES), target]
    subprocess.run(make, cwd=tmp_path, env=environment, check=True, capture_output=True)
    monkeypatch.chdir(ROOT)
    programs = set()
    for line in (tmp_path / "commands").read_text().splitlines():
        program, name, *words = line.split("\037")[:-1]
        programs.add(program)
        if program == "python":
            script = Path(name).read_text(encoding="utf-8")
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), line
            continue
        command, context = COMMANDS[name], typer.Context(COMMANDS[name], info_name="lvctx")
        while hasattr(command, "commands"):
            context = typer.Context(command, parent=context, info_name=name)
            name, *words = words
            command = command.commands[name]
        command.make_context(name, words, parent=context)
    assert "lvctx" in programs or target == "start-images"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_recipes_name_real_flags_and_their_values(recipe: Path) -> None:
    for section, values in tomllib.loads(recipe.read_text(encoding="utf-8")).items():
        command = next((c for name, c in COMMANDS.items() if section == name or section.startswith(f"{name}-")), None)
        assert command is not None, f"[{section}] belongs to no command"
        parts = [command, *getattr(command, "commands", {}).values()]  # a section may be of any command of a group
        known = {p.name: p for part in parts for p in part.params}
        assert {key.replace("-", "_") for key in values} <= known.keys(), section
        for key, value in values.items():
            parameter = known[key.replace("-", "_")]
            repeated = parameter.multiple or parameter.nargs == -1
            parameter.process_value(typer.Context(command), _recipe_value(value, repeated=repeated))
