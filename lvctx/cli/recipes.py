"""Recipes: defaults of a command's options from a section of a TOML file."""

from pathlib import Path
from typing import Any

import typer

from lvctx.artifacts.bounded import read_toml
from lvctx.errors import InputError


def load_recipe(ctx: typer.Context, recipe: str | None) -> str | None:
    """Take defaults from `FILE.toml[#section]`; the section defaults to the command's name.

    A table is converted to `key=value,key=value`, an array of tables to a repeated option. Raises InputError for a
    missing file, a missing section or an unknown key.
    """
    if recipe is None:
        return None
    name, _, section = recipe.partition("#")
    words, level = [str(ctx.info_name)], ctx.parent
    while level is not None and level.parent is not None:
        words, level = [str(level.info_name), *words], level.parent
    command_name = " ".join(words)
    section = section or command_name.replace(" ", "-")
    table = read_toml(Path(name))
    if not isinstance(table.get(section), dict):
        raise InputError(f"no section [{section}]", where=name, fix=f"sections: {', '.join(table)}")
    parameters: dict[str, Any] = {str(p.name): p for p in ctx.command.params}
    values = {}
    for key, value in table[section].items():
        parameter = parameters.get(key.replace("-", "_"))
        if parameter is None:
            raise InputError(f"unknown key {key!r} in [{section}]", where=name, fix=f"lvctx {command_name} --help")
        repeated = getattr(parameter, "multiple", False) or parameter.nargs == -1
        values[parameter.name] = _recipe_value(value, repeated=repeated)
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return recipe


def _recipe_value(value: Any, *, repeated: bool) -> Any:
    """The command-line text of a TOML value: tables and lists become comma-separated."""
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    if isinstance(value, list) and not repeated:
        return ",".join(map(str, value))
    return [_recipe_value(part, repeated=False) for part in value] if isinstance(value, list) else value
