"""Input that is damaged or hostile: one line, an exit code of the contract, at most 10 s and 2 GiB."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import broken, warm_server
from support.limited import fault, limited, refused

from lvctx.artifacts.describe import describe
from lvctx.cli.app import MODULES
from lvctx.errors import InputError

LISTS, OBJECTS = "[" * 100_000, '{"a":' * 100_000
DIGITS = "1" * 5000


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.save_lm(tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture(scope="module")
def vlm(lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.save_vlm(lm, tiny_tower, tmp_path_factory.mktemp("vlm") / "vlm")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("hello world. " * 500)
    return tmp_path / "text.txt"


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe.toml")
    return tmp_path / "pipe.toml"


def niah(model: Path, text: Path, out: Path) -> list[object]:
    grid = ["--lengths", 300, "--depths", 0.5, "--trials", 1, "-q"]
    return ["niah", "text", "--model", model, "--haystack", text, *grid, "-o", out]


def pack(text: object, lm: object, out: object) -> list[object]:
    return ["pack-text", text, "-o", out, "--tokenizer", lm, "--seq-len", 64, "--keep-short", 1, "-q"]


# Recipes


@pytest.mark.parametrize(
    "content",
    [
        b"[info]\nx = '\xe9'",
        b"[info]\nx = " + b"[" * 100_000,
        b"info = 3",
        b"[info]\njson = 1" + b"0" * 5000,
        b"[info]\n" + b".".join([b"a"] * 30_000) + b" = 1",
        b"\0" * 2_000_000,
    ],
)
def test_recipes(lm: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    refused("info", lm, "--recipe", tmp_path / "r.toml", where="r.toml")


def test_a_recipe_or_mix_that_has_no_end(lm: Path, text: Path, pipe: Path, tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), pipe, tmp_path):
        refused("info", lm, "--recipe", path, where=path)
        refused(*pack(text, lm, tmp_path / "x"), "--mix", path, where=path)


def test_a_nul_in_a_recipe(lm: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[info]\nvideo = "a\\u0000b"\ncontact-sheet = "x"\n')
    refused("info", lm, "--recipe", tmp_path / "r.toml", code=2)


# Outputs


def test_an_output_below_a_file(lm: Path, vlm: Path, text: Path, tmp_path: Path) -> None:
    out = text / "x"
    commands: dict[str, list[object]] = {
        "pack-text": pack(text, lm, out),
        "extend-lm": ["extend-lm", "--model", lm, "--steps", 0, "-o", out, "--rope-theta", 1e6],
        "align": ["align", "--model", lm, "--vision", vlm, "--image-text", text, "-o", out],
        "pack-chat": ["pack-chat", "--model", vlm, "--image", text, "--target-length", 256, "-o", out],
        "encode-video": ["encode-video", text, "--model", vlm, "--frames", 2, "-o", out],
        "mrope-extend": ["mrope-extend", "--model", vlm, "--scale", 2, "-o", out],
        "niah": niah(lm, text, out),
        "videomme": ["videomme", "run", "--model", vlm, "--questions", text, "--videos", tmp_path, "-o", out],
        "import-longva": ["import-longva", vlm, "-o", out],
        "export": ["export", lm, "--to", "hf", "-o", out],
        "report": ["report", text, "-o", text / "x.html"],
        "perplexity": ["perplexity", lm, "--data", text, "-o", text / "x.png"],
    }
    for name, command in commands.items():
        done = limited(*command)
        assert not fault(done), f"{name}: {fault(done)}"
        assert done.returncode in (2, 3), name
    assert set(MODULES) - set(commands) == {"vqa", "bench", "info", "plan", "doctor"}, "they have no -o, or videomme's"
    refused("export", lm, "--to", "hf", "-o", tmp_path / ("x" * 300), where="too long")


# JSON


@pytest.mark.parametrize("content", [LISTS, OBJECTS, f'{{"a": {DIGITS}}}', "[]", '{"a": "\udce9"}'])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_json_of_a_model(lm: Path, text: Path, tmp_path: Path, file: str, content: str) -> None:
    model = broken.clone(lm, tmp_path / "model")
    (model / file).write_text(content, errors="surrogateescape")
    command = niah(model, text, tmp_path / "x") if file == "config.json" else pack(text, model, tmp_path / "x")
    done = limited(*command)
    assert not fault(done), fault(done)
    refused("info", model, where="config.json") if file == "config.json" else None


@pytest.mark.parametrize("content", [LISTS, OBJECTS, DIGITS])
def test_json_of_every_reader(vlm: Path, text: Path, tmp_path: Path, content: str) -> None:
    for suffix in ("json", "jsonl"):
        path = tmp_path / f"a.{suffix}"
        path.write_text(content)
        refused(*pack(path, vlm, tmp_path / "x"), where=path.name)
        chat = ["--target-length", 256, "--long-share", 0, "-o", tmp_path / "y"]
        refused("pack-chat", "--model", vlm, "--image", path, *chat, where=path.name)
    refused("videomme", "score", tmp_path / "a.json", where="a.json")
    refused(*pack(text, vlm, tmp_path / "x"), "--mix", tmp_path / "a.json", where="a.json")
    for line in (f'{{"path": {content}', f'{{"path": {content}'):
        refused(
            "encode-video", "-", "--model", vlm, "--frames", 2, "-o", tmp_path, stdin=line.encode(), where="stdin:1"
        )
    for name in ("MANIFEST.json", "results.jsonl", "summary.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "results.jsonl").write_text('{"key": "1"}\n')
        (folder / name).write_text(content + "\n")
        refused("info", folder, where=folder)


# safetensors


def safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


TWICE = json.dumps(entry([2], 0, 8))
HEADERS: dict[str, tuple[Any, bytes]] = {
    "no object": ([1, 2], b""),
    "huge shape": ({"a": entry([10**18], 0, 8)}, b"0" * 8),
    "negative": ({"a": entry([2], -8, 0)}, b"0" * 8),
    "overlapping": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12),
    "a gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12),
    "a name twice": (f'{{"a": {TWICE}, "a": {TWICE}}}'.encode(), b"0" * 8),
    "deep": (b'{"a":' + LISTS.encode(), b""),
    "deep metadata": ({"__metadata__": {"lvctx": LISTS}, "a": entry([2], 0, 8)}, b"0" * 8),
    "metadata is a list": ({"__metadata__": [1], "a": entry([2], 0, 8)}, b"0" * 8),
    "metadata of a number": ({"__metadata__": {"lvctx": 3}, "a": entry([2], 0, 8)}, b"0" * 8),
    "provenance is a list": ({"__metadata__": {"lvctx": "[1]"}, "a": entry([2], 0, 8)}, b"0" * 8),
    "another size": ({"a": entry([3], 0, 8)}, b"0" * 8),
    "unknown type": ({"a": entry([2], 0, 8, dtype="X")}, b"0" * 8),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "long number": (f'{{"a": {{"dtype": "F32", "shape": [{DIGITS}], "data_offsets": [0, 8]}}}}'.encode(), b"0" * 8),
    "95 MB": (b'{"__metadata__":{"x":"' + b" " * 95_000_000 + b'"}}', b""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(lm: Path, text: Path, tmp_path: Path, name: str) -> None:
    file = safetensors(tmp_path / "x.safetensors", *HEADERS[name])
    refused("info", file, where=file)
    model = broken.clone(lm, tmp_path / "model")
    (model / "model.safetensors").unlink()
    file.rename(model / "model.safetensors")
    refused("info", model, where="model.safetensors")


def test_frames_without_their_provenance(vlm: Path, tmp_path: Path) -> None:
    metadata = {"lvctx": json.dumps({"schema": "lvctx.frames/1"})}
    tensors = {"features": entry([2], 0, 8), "pts": entry([2], 8, 16), "index": entry([2], 16, 24)}
    file = safetensors(tmp_path / "x.safetensors", {"__metadata__": metadata, **tensors}, b"0" * 24)
    refused("vqa", file, "--model", vlm, "--ask", "Why?", where=file)
    refused("info", file, "--contact-sheet", tmp_path / "s.png", where=file)


# Configurations and templates


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1024},
        {"vocab_size": 10**12},
        {"vocab_size": 1 << 26},
        {"hidden_size": 1 << 22},
        {"num_labels": 10**9},
        {"some_config": {"encoder_layers": 10**9}},
    ],
)
def test_a_configuration_that_describes_too_much(lm: Path, text: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    model = broken.edit(broken.clone(lm, tmp_path / "model"), **values)
    refused(*niah(model, text, tmp_path / "x"), where=model)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}" * 200,
    ],
)
def test_hostile_templates(vlm: Path, tmp_path: Path, template: str) -> None:
    model = broken.clone(vlm, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    chat = ["--target-length", 256, "--long-share", 0, "-o", tmp_path / "x", "-q", "--template", "own"]
    refused("pack-chat", "--model", model, "--image", tmp_path / "chat.json", *chat)


# Data


def test_a_gzip_bomb(lm: Path, tmp_path: Path) -> None:
    member = gzip.compress(bytes(1 << 24))
    for name in ("a.txt.gz", "a.jsonl.gz", "a.csv.gz"):
        path = tmp_path / name
        path.write_bytes(member * 64)
        kind = pack(path, lm, tmp_path / "x")
        refused(*(kind if "csv" not in name else ["bench", "nextqa", "score", path]))


def test_data_without_end(lm: Path, vlm: Path, text: Path, pipe: Path, tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), pipe):
        refused(*pack(path, lm, tmp_path / "x"), where=path)
        refused(*niah(lm, path, tmp_path / "x"), where=path)
        chat = ["--target-length", 256, "--long-share", 0, "-o", tmp_path / "x"]
        refused("pack-chat", "--model", vlm, "--image", path, *chat, where=path)
        refused("videomme", "score", path, where=path)
        refused("info", path, where=path)


def test_a_row_of_a_billion_tokens(lm: Path, text: Path, tmp_path: Path) -> None:
    refused("pack-text", text, "-o", tmp_path / "x", "--tokenizer", lm, "--seq-len", 10**9, code=2)


def test_ids_that_the_model_does_not_have(lm: Path, text: Path, tmp_path: Path) -> None:
    assert limited(*pack(text, lm, tmp_path / "rows")).returncode == 0
    shard = tmp_path / "rows" / "shard-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])["input_ids"]["data_offsets"]
    whole[begin + header[0] + 400 : begin + header[0] + 404] = struct.pack("<i", 320)
    shard.write_bytes(whole)
    train = ["extend-lm", "--model", lm, "--data", tmp_path / "rows", "--steps", 1, "--batch-tokens", 64]
    refused(*train, "--rope-theta", 1e6, "-o", tmp_path / "x", where=shard)


def test_a_manifest_that_says_something_else(lm: Path, text: Path, tmp_path: Path) -> None:
    assert limited(*pack(text, lm, tmp_path / "rows")).returncode == 0
    path = tmp_path / "rows" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for key in ("files", "shard_rows", "rows", "seq_len", "inputs", "sources", "length_bins"):
        for value in (None, -1, [{}]):
            path.write_text(json.dumps({**manifest, key: value}))
            with pytest.raises(InputError, match=key):
                describe(tmp_path / "rows")


# Names


def test_names_that_no_file_has(vlm: Path, lm: Path, tmp_path: Path) -> None:
    encode = ["encode-video", "-", "--model", vlm, "--frames", 2, "-q", "-o", tmp_path / "x"]
    for line in (b"a\0b", b'{"path": "a\\u0000b"}', b'{"path": "\\ud800"}', b'{"path": 3}', b"\xff.mp4", b"x" * 5000):
        done = limited(*encode, stdin=line + b"\n")
        assert not fault(done), fault(done)
        assert done.returncode in (3, 4)
    for name in ("x" * 5000, b"\xff"):
        refused("info", name)
        refused(*pack(name, lm, tmp_path / "x"))
        refused("info", lm, "--recipe", name)
        refused("vqa", "x.mp4", "--model", name, "--ask", "Why?")


def test_names_that_are_not_utf8(lm: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    os.link(text, os.fsencode(folder) + b"/\xff.txt")
    for n, inputs in enumerate((folder, os.fsencode(folder) + b"/\xff.txt")):
        done = limited(*pack(inputs, lm, tmp_path / f"x{n}"))
        assert not fault(done), fault(done)
        assert done.returncode == 0


# Streams


def shell(line: str) -> tuple[int, str]:
    """Exit code and stderr of a line in which $L is the program."""
    environment = {**os.environ, "L": str(warm_server.start()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], env=environment, capture_output=True, timeout=60, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version | true", 141),
        ("--help | true", 141),
        ("--version > /dev/full", 3),
        ("info {lm} > /dev/full", 3),
        ("--help > /dev/full", 3),
        ("info /nowhere 2> /dev/full", 3),
    ],
)
def test_streams_that_take_nothing(lm: Path, command: str, code: int) -> None:
    found, said = shell(f"$L {command.format(lm=lm)}")
    assert found == code
    assert said.count("\n") <= 1


def test_closed_streams(lm: Path, vlm: Path, tmp_path: Path) -> None:
    """Started without the server, whose client needs its streams."""
    program = f"{sys.executable} -m lvctx"
    assert shell(f"{program} info {lm} >&-") == (3, "lvctx: stdout: closed; redirect it to a file or to /dev/null\n")
    assert shell(f"{program} info {lm} <&- 2>&- > {tmp_path}/row")[0] == 0
    assert json.loads((tmp_path / "row").read_text())["model"]
    found, said = shell(f"{program} pack-text - -o {tmp_path}/x --tokenizer {lm} --seq-len 64 <&-")
    assert (found, said.count("\n")) == (3, 1)


# Signals and permissions


def test_a_signal_in_a_callback_that_swallows_exceptions() -> None:
    script = textwrap.dedent("""
        import time, weakref
        from lvctx.cli import app as program
        class Thing: pass
        @program.app.command("wait")
        def wait() -> None:
            thing = Thing()
            def gone(_):
                print("ready", flush=True)
                time.sleep(1)
            ref = weakref.ref(thing, gone)
            del thing
            time.sleep(60)
        program.app()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 75
    assert said.count("\n") == 1


def test_weights_are_readable_like_any_new_file(lm: Path, tmp_path: Path) -> None:
    assert limited("extend-lm", "--model", lm, "--steps", 0, "--rope-theta", 1e6, "-o", tmp_path / "x").returncode == 0
    (tmp_path / "new").touch()
    for path in (tmp_path / "x").glob("*.safetensors"):
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
