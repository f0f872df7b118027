"""Options come from configuration dataclasses: every field is one, with its help; precedence, recipes and checks."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer.main

from lvctx.cli import options, output
from lvctx.cli.app import COMMANDS, MODULES, app, load_command
from lvctx.cli.options import OutputOptions, build, command, config_classes, field_help, given, option_name
from lvctx.config import Flag, Seed, hashed_fields, parse_integers, parse_numbers, parse_token_count

LOADED = {name: load_command(name) for name in MODULES}
DECLARED = {name: made for name, made in options._declared.items() if made.function is not None}
"""Commands whose options come from dataclasses."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Inherited."""

    frames: Annotated[int, Flag(min=1)] = 8
    """Frames of a video
    [evenly spaced].

    Not a part of the help.
    """


@dataclass(frozen=True, kw_only=True)
class TrialConfig(BaseConfig):
    """One field of every kind."""

    inputs: Annotated[tuple[str, ...], Flag(argument=True, metavar="INPUT", in_hash=False)]
    """Inputs."""
    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Output."""
    rope: Literal["theta", "yarn"] = "theta"
    """Scheme."""
    factor: Annotated[float | None, Flag(min=1.0, needs=("rope=yarn",))] = None
    """Factor."""
    depths: Annotated[tuple[float, ...], Flag(parse=parse_numbers, metavar="N,...")] = (0.0, 0.5, 1.0)
    """Depths."""
    tokens: Annotated[int | None, Flag(parse=parse_token_count)] = None
    """Tokens."""
    data: tuple[Path, ...] = ()
    """Data."""
    stages: Annotated[tuple[str, ...], Flag(names=("--stage",), needs=("data",))] = ()
    """Stages."""
    reuse: bool = True
    """Reuse."""
    loop: bool = False
    """Loop."""
    seed: Seed = 0
    """Seed."""


calls: list[tuple[TrialConfig, frozenset[str]]] = []


@command("trial", "lvctx trial a -o b")
def trial(config: TrialConfig, run: OutputOptions, ctx: typer.Context) -> None:
    """Record the configuration."""
    calls.append((config, given(ctx)))


options.group("outer", "A group.\n\nMore.", "lvctx outer first -o b a")
command("outer first")(trial)
command("outer inner second")(trial)
options.group("outer inner", "A group in it.")


def run(*args: object) -> Any:
    """The exit code of `lvctx trial`, None for 0."""
    program: Any = typer.main.get_command(app)
    program.add_command(build("trial"))
    calls.clear()
    return program.main(["trial", *map(str, args)], standalone_mode=False)


def parsed(*args: object) -> TrialConfig:
    assert run("a", "-o", "out", *args) is None
    return calls[0][0]


def test_every_kind_of_field() -> None:
    assert parsed() == TrialConfig(inputs=("a",), out=Path("out"))
    config = parsed("b", "--rope", "yarn", "--factor", 2, "--depths", "1,0", "--data", "x", "--data", "y", "--loop")
    assert config.inputs == ("a", "b")
    assert (config.rope, config.factor, config.depths, config.loop) == ("yarn", 2.0, (0.0, 1.0), True)
    assert config.data == (Path("x"), Path("y"))
    assert parsed("--no-reuse", "--tokens", "1.5K", "--frames", 3).reuse is False
    assert calls[0][0].tokens == 1500
    assert calls[0][1] == {"inputs", "out", "reuse", "tokens", "frames"}


def test_help_is_the_docstring_of_the_field_or_of_the_field_it_inherits() -> None:
    help = field_help(TrialConfig)
    assert help["frames"] == "Frames of a video [evenly spaced]."
    assert set(help) == {field.name for field in fields(TrialConfig)}
    shown = {p.name: p for p in build("trial").params}
    assert shown["depths"].default == "0,0.5,1"
    assert shown["frames"].help == "Frames of a video \\[evenly spaced]."
    assert not any(p.show_envvar for p in shown.values())


def test_what_cannot_be_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (("--depths", "a"), "--depths 'a': write comma-separated numbers"),
        (("--tokens", "many"), "--tokens 'many': not a number"),
        (("--factor", 2), "--factor needs --rope yarn; drop --factor, or give --rope yarn"),
        (("--stage", "lr=1"), "--stage needs --data"),
    ):
        assert run("a", "-o", "out", *args) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lvctx: {message}")
        assert error.count("\n") == 1
    for args in (("--frames", 0), ("--rope", "pi"), ("--factor", 0.5, "--rope", "yarn")):
        with pytest.raises(Exception, match=r"not one of|in the range|greater than"):
            run("a", "-o", "out", *args)


def test_flag_then_environment_then_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[trial]\ndepths = [0, 0.25]\nframes = 4\nrope = "yarn"\ndata = ["x"]\nloop = true\n'
        "[[trial.stages]]\nlr = 1e-5\nsteps = 2\n[[trial.stages]]\nsteps = 3\n"
    )
    config = parsed("--recipe", recipe)
    assert (config.frames, config.rope, config.data, config.loop) == (4, "yarn", (Path("x"),), True)
    assert config.depths == (0, 0.25)
    assert config.stages == ("lr=1e-05,steps=2", "steps=3")
    assert {"frames", "rope", "data", "loop", "stages", "recipe"} <= calls[0][1]
    monkeypatch.setenv("LVCTX_TRIAL_FRAMES", "5")
    assert parsed("--recipe", recipe).frames == 5
    assert parsed("--recipe", recipe, "--frames", 6).frames == 6


def test_groups_in_groups() -> None:
    program: Any = typer.main.get_command(app)
    program.add_command(build("outer"))
    assert list(program.commands["outer"].commands) == ["first", "inner"]
    assert "lvctx outer first" in program.commands["outer"].epilog
    calls.clear()
    assert program.main(["outer", "inner", "second", "a", "-o", "out"], standalone_mode=False) is None
    assert calls[0][0] == TrialConfig(inputs=("a",), out=Path("out"))


def test_what_identifies_a_run() -> None:
    hashed = hashed_fields(TrialConfig(inputs=("a",), out=Path("out")))
    assert "inputs" not in hashed
    assert "out" not in hashed
    assert hashed["frames"] == 8


def test_whole_numbers() -> None:
    assert parse_integers("2,1,2") == (1, 2)
    for text in ("1.5", "", "nan"):
        with pytest.raises(ValueError, match="write comma-separated"):
            parse_integers(text)


def test_rows_are_json_for_programs_and_a_line_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"rows": 1200, "fill": 0.98765, "mix": {"a": 1}}
    row = {"schema": "lvctx.packed/1", "path": "rows", "sha256": "0" * 64, **facts}
    output.emit(row)
    assert json.loads(capsys.readouterr().out) == row
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.emit(row)
    assert capsys.readouterr().out == "rows: rows 1,200, fill 0.9877\n"
    output.emit({"dry_run": True, "path": "rows", "mix": {"a": 1}})
    assert capsys.readouterr().out == "path   rows\nmix.a  1\n"
    output.configure(json=True, quiet=False, verbose=False)
    output.emit(row)
    output.configure(json=False, quiet=False, verbose=False)
    assert json.loads(capsys.readouterr().out) == row


@pytest.mark.parametrize("name", DECLARED)
def test_every_field_of_a_command_is_an_option_with_help(name: str) -> None:
    function = DECLARED[name].function
    assert function is not None
    parameters = {p.name: p for p in build(name).params}
    for config_class in config_classes(function).values():
        help = field_help(config_class)
        for field, _, flag in options.config_fields(config_class):
            assert help.get(field.name), f"{config_class.__name__}.{field.name} has no docstring"
            parameter = parameters.pop(field.name)
            assert parameter.name == field.name, "a recipe's key"
            assert flag.argument or option_name(field, flag) in parameter.opts
            for need in flag.needs:
                assert need.partition("=")[0] in {p.name for p in build(name).params}
    assert not parameters


@pytest.mark.parametrize("name", MODULES)
def test_the_line_in_the_programs_help_is_the_first_of_the_commands(name: str) -> None:
    lines = {name: line for commands in COMMANDS.values() for name, (_, line) in commands.items()}
    if name in options._declared:
        assert LOADED[name].help.split("\n\n")[0] == lines[name]
