"""`--protocol` of the benchmarks and `lvctx bench protocols`: values of options from published evaluations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from lvctx.cli.options import OutputOptions, command, config_fields, has_effect
from lvctx.cli.output import emit, is_quiet, say, wants_json
from lvctx.cli.tables import open_console
from lvctx.config import Flag
from lvctx.errors import UsageError

if TYPE_CHECKING:
    from lvctx.eval.benchmarks.protocol import EvalProtocol

SAMPLING_KEYS = ("fps", "frames", "max_frames")


def protocol_presets(bench: str) -> Callable[[Mapping[str, Any], frozenset[str]], Mapping[str, Any]]:
    """Values of --protocol for the options of a benchmark's `run`; see `command`."""

    def presets(values: Mapping[str, Any], set_by_user: frozenset[str]) -> Mapping[str, Any]:
        if values["protocol"] is None:
            return {}
        from lvctx.eval.benchmarks.protocol import load_protocol

        return load_protocol(values["protocol"], bench).option_values(values, set_by_user)

    return presets


def protocol_facts(name: str | None, bench: str, *configs: Any) -> dict[str, Any] | None:
    """What rows have about --protocol, given all configurations of a run; None without a protocol.

    Raises UsageError for a protocol whose subtitles are missing, or whose frames a server would have to sample.
    """
    if name is None:
        return None
    from lvctx.eval.benchmarks.protocol import describe_protocol, load_protocol

    protocol = load_protocol(name, bench)
    fields = [(c, field.name, flag) for c in configs for field, _, flag in config_fields(type(c))]
    values = {key: getattr(config, key) for config, key, _ in fields}
    if values["send"] == "file-url":
        if sampling := [key for key in SAMPLING_KEYS if key in protocol.values]:
            what = " and ".join(f"--{key.replace('_', '-')}" for key in sampling)
            raise UsageError(
                f"--protocol {name} sets {what}", fix="drop --send file-url: the server samples such a video"
            )
        values["frame_pixels"] = None
    facts = protocol.facts(values, [key for _, key, flag in fields if not has_effect(flag, values)])
    if not is_quiet() and (facts.get("departs") or facts.get("not_applied")):
        say(f"lvctx: protocol {describe_protocol(facts)}")
    return facts


@dataclass(frozen=True, kw_only=True)
class ProtocolsConfig:
    """Which protocols."""

    protocols: Annotated[tuple[str, ...], Flag(argument=True, metavar="[NAME...]")] = ()
    """Protocols to list; all of them by default."""


@command("bench protocols", "lvctx bench protocols", "lvctx bench protocols longva qwen2.5-vl --json")
def list_protocols(config: ProtocolsConfig, output: OutputOptions) -> None:
    """List the protocols of --protocol: published evaluations, their values and sources, and what they leave out.

    A protocol sets options of `videomme run` and `bench NAME run` that are not given otherwise. What its sources do not
    state is listed as not stated, and keeps its default.
    """
    from lvctx.eval.benchmarks.protocol import protocol_names, read_protocol

    for name in config.protocols or protocol_names():
        protocols = list(read_protocol(name).values())
        if wants_json():
            for protocol in protocols:
                emit(_row(protocol))
        else:
            _print_protocol(protocols)


def _row(protocol: "EvalProtocol") -> dict[str, Any]:
    from lvctx.artifacts.schemas import PROTOCOL

    return {
        "schema": PROTOCOL,
        "protocol": protocol.name,
        "bench": protocol.bench,
        "title": protocol.title,
        "hash": protocol.hash,
        "values": dict(protocol.values),
        "not_stated": protocol.not_stated,
        "notes": list(protocol.notes),
        "sources": list(protocol.sources),
    }


def _print_protocol(protocols: "list[EvalProtocol]") -> None:
    from rich.table import Table

    console = open_console()
    console.print(f"{protocols[0].name}: {protocols[0].title}", style="bold")
    table = Table("", box=None, pad_edge=False)
    for protocol in protocols:
        table.add_column(protocol.bench)
    for key in dict.fromkeys(key for p in protocols for key in (*p.values, *p.not_stated)):
        table.add_row(key, *(_cell(protocol, key) for protocol in protocols))
    console.print(table)
    for kind in ("sources", "notes"):
        lines = dict.fromkeys(line for protocol in protocols for line in getattr(protocol, kind))
        for line in lines:
            benches = [p.bench for p in protocols if line in getattr(p, kind)]
            only = "" if len(benches) == len(protocols) else f"{', '.join(benches)}: "
            console.print(f"  {'source: ' if kind == 'sources' else ''}{only}{line}")
    console.print()


def _cell(protocol: "EvalProtocol", key: str) -> str:
    if key in protocol.values:
        return str(protocol.values[key])
    return "not stated" if key in protocol.not_stated else ""
