"""Packaged evaluation protocols: the published settings with which a number was computed. No torch.

A protocol is a file `protocols/NAME.toml`. Its `[options]` hold for all benchmarks that have a table of their own,
which adds to them. Keys are options of `run` and have their notation; only `subtitles` ("none" or "required") and
`rule`, the rule of `answers` that the number was scored with, are not. A key that its sources do not state is left out.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lvctx.artifacts.result_log import short_hash
from lvctx.errors import InputError, UsageError

REQUIREMENTS = ("subtitles", "rule")
"""Keys that are no options of `run`."""
IMAGE_BENCHMARKS = ("vhs",)
"""Benchmarks without video, which have no sampling."""


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """What a protocol states for one benchmark."""

    name: str
    """Name of its file."""
    bench: str
    """Name of the benchmark."""
    title: str
    """Which numbers it repeats."""
    sources: tuple[str, ...]
    """Paper and table, or repository and file, of the values."""
    notes: tuple[str, ...]
    """What the published evaluation has and no option can set, and its variants."""
    values: Mapping[str, Any]
    """Key -> value, of what is stated."""

    @property
    def hash(self) -> str:
        """Sixteen hex digits that identify the values; notes and sources do not count."""
        return short_hash({"name": self.name, "bench": self.bench, "values": dict(self.values)})

    @property
    def not_stated(self) -> list[str]:
        """The keys for which the sources have no value, and the defaults of the options hold."""
        keys = ["prompt", "temperature", "max_new_tokens"]
        if self.bench not in IMAGE_BENCHMARKS:
            keys += [] if {"fps", "frames"} & set(self.values) else ["fps or frames"]
            keys += ["max_frames"] if "frames" not in self.values else []
            keys += ["frame_pixels", "rule"]
        if self.bench in ("videomme", "videomme-v2"):
            keys.append("subtitles")
        if self.values.get("temperature"):
            keys += ["top_p", "top_k", "seed"]
        return [key for key in keys if key not in self.values]

    def option_values(self, values: Mapping[str, Any], set_by_user: Iterable[str]) -> dict[str, Any]:
        """The protocol's values of options that the user did not set.

        A number or a file of frames replaces the protocol's rate and its limit, and a rate its number of frames.
        """
        excluded = {*REQUIREMENTS, *set_by_user}
        if {"frames", "frames_from"} & excluded:
            excluded |= {"fps", "frames", "max_frames"}
        if "fps" in excluded:
            excluded |= {"frames", *(("max_frames",) if values.get("fps") == "native" else ())}
        return {key: value for key, value in self.values.items() if key not in excluded}

    def facts(self, actual: Mapping[str, Any], not_applied: Iterable[str]) -> dict[str, Any]:
        """What rows have about it: name, hash and values, and those of `actual` that differ, where any do.

        `not_applied` are the options without effect in this run. Raises UsageError where subtitles are missing.
        """
        stated = {key: value for key, value in self.values.items() if key not in REQUIREMENTS}
        if "fps" in stated or "frames" in stated:
            stated = {"fps": None, "frames": None, **stated}
        idle = [key for key in not_applied if key in self.values]
        differing = {k: actual[k] for k in stated if k not in idle and actual[k] != stated[k]}
        if self.values.get("subtitles") == "required" and actual["subtitles"] is None:
            raise UsageError(f"protocol {self.name} has subtitles", fix="give --subtitles DIR")
        if self.values.get("subtitles") == "none" and actual["subtitles"] is not None:
            differing["subtitles"] = "given"
        facts: dict[str, Any] = {"name": self.name, "hash": self.hash, "values": dict(self.values)}
        return facts | ({"departs": differing} if differing else {}) | ({"not_applied": idle} if idle else {})


def protocol_names() -> list[str]:
    """Names of the packaged protocols, in alphabetical order."""
    names = (entry.name for entry in files(__package__).joinpath("protocols").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


@cache
def read_protocol(name: str) -> dict[str, EvalProtocol]:
    """A protocol for each benchmark that it has values for. Raises UsageError for an unknown name."""
    if name not in protocol_names():
        raise UsageError(
            f"no protocol {name!r:.60}", where="--protocol", fix=f"give one of {', '.join(protocol_names())}"
        )
    text = files(__package__).joinpath("protocols", f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    title, sources, notes = table.pop("title"), table.pop("sources", []), table.pop("notes", [])
    common = table.pop("options", {})
    protocols = {}
    for bench, own in table.items():
        protocols[bench] = EvalProtocol(
            name=name,
            bench=bench,
            title=title,
            sources=(*sources, *own.pop("sources", [])),
            notes=(*notes, *own.pop("notes", [])),
            values=common | own,
        )
    return protocols


def load_protocol(name: str, bench: str) -> EvalProtocol:
    """A protocol for a benchmark. Raises UsageError where there is none of this name, or it has nothing for `bench`."""
    protocols = read_protocol(name)
    if bench not in protocols:
        others = [other for other in protocol_names() if bench in read_protocol(other)]
        fix = f"give one of {', '.join(others)}" if others else "drop it"
        raise UsageError(f"protocol {name} states nothing for {bench}", where="--protocol", fix=fix)
    return protocols[bench]


def protocol_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The protocol that rows of results.jsonl follow; None for those that follow none.

    Raises InputError for rows of several.
    """
    found: list[dict[str, Any] | None] = []
    for row in rows:
        made_of = row.get("made_of")
        facts = made_of.get("protocol") if isinstance(made_of, dict) else None
        facts = facts if isinstance(facts, dict) else None
        if facts not in found:
            found.append(facts)
    if len(found) > 1:
        names = " and ".join("none" if facts is None else describe_protocol(facts) for facts in found[:2])
        raise InputError(f"rows of several protocols: {names}", fix="give one run's rows")
    return found[0] if found else None


def describe_protocol(facts: Mapping[str, Any]) -> str:
    """`longva (frames 128, temperature 0.0), departs: frames 32`."""
    line = f"{facts.get('name')} ({_pairs(_table(facts, 'values'))})"
    departs = _table(facts, "departs")
    idle = facts.get("not_applied")
    line += f", departs: {_pairs(departs)}" if departs else ""
    return line + (f", not applied: {', '.join(map(str, idle))}" if isinstance(idle, list) and idle else "")


def protocol_difference(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> str:
    """In what the protocols of two runs differ, departures included; empty if they do not."""
    if first is None or second is None:
        pair = ["no protocol" if facts is None else describe_protocol(facts) for facts in (first, second)]
        return "" if first is second else f"{pair[0]}, and {pair[1]}"
    a, b = _in_effect(first), _in_effect(second)
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {_shown(a.get(key))} and {_shown(b.get(key))}" for key in keys)


def _in_effect(facts: Mapping[str, Any]) -> dict[str, Any]:
    values = {"name": facts.get("name"), **_table(facts, "values"), **_table(facts, "departs")}
    idle = facts.get("not_applied")
    return {key: value for key, value in values.items() if not isinstance(idle, list) or key not in idle}


def _table(facts: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
