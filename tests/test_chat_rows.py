"""Rows of chat data in the forms they are published in: every command reads them in the same way, or names the row."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import aligning
from support.aligning import draw, talk, write
from support.refusals import refused

from lvctx.data.chat_encoding import to_messages
from lvctx.data.conversations import Conversation, parse_conversation, read_conversations, read_pairs
from lvctx.data.pack_chat import plan_pack_chat, run_pack_chat
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.packed_chat import ChatRows
from lvctx.data.records import Record
from lvctx.data.row_media import Media
from lvctx.errors import InputError
from lvctx.models.chat_template import Visual
from lvctx.models.loading import load_tokenizer
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import VIDEO_TOKEN

IMAGE = Visual(VIDEO_TOKEN)
HI = talk("Hi", "Hello")


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages(conversation: Conversation) -> tuple[dict[str, Any], ...]:
    return to_messages(conversation, lambda kind: VIDEO_TOKEN)


HEY = [message("user", "Hi"), message("assistant", "x")]


def turns_of(row: Any) -> list[tuple[str, list[str]]]:
    """Roles, and text with media as [path]."""
    return [
        (role, [f"[{part.path}]" if isinstance(part, Media) else part for part in parts])
        for role, parts in parse_conversation(Record("here", row)).turns
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [gpt("I can."), human("Hi"), gpt("Yes?")]}, [("user", ["Hi"]), ("assistant", ["Yes?"])]),
        (
            {"messages": [message("system", "S"), message("assistant", "Hm"), *HEY]},
            [("system", ["S"]), ("user", ["Hi"]), ("assistant", ["x"])],
        ),
        (
            {"image": "a.png", "conversations": [gpt("Sure."), human("<image>\nWhat?"), gpt("Noise.")]},
            [("user", ["[a.png]", "What?"]), ("assistant", ["Noise."])],
        ),
        (
            talk("An <image> element\n<video>", "<rss><image></image></rss>"),
            [("user", ["An <image> element\n<video>"]), ("assistant", ["<rss><image></image></rss>"])],
        ),
        (
            talk("<image>\nIs it a <video>?", "no", image="a.png"),
            [("user", ["[a.png]", "Is it a <video>?"]), ("assistant", ["no"])],
        ),
        (
            talk("<image>\n<video>And?", "no", video=["a.mp4", "b.mp4"]),
            [("user", ["[a.mp4]", "[b.mp4]", "And?"]), ("assistant", ["no"])],
        ),
        ({"system": "Be brief.", **HI}, [("system", ["Be brief."]), ("user", ["Hi"]), ("assistant", ["Hello"])]),
        ({"system": "", **HI}, [("user", ["Hi"]), ("assistant", ["Hello"])]),
        ({"system": None, "messages": None, "image": None, **HI}, [("user", ["Hi"]), ("assistant", ["Hello"])]),
        (
            {"system": "S", "conversations": [{"from": "system", "value": "S"}, human("Hi"), gpt("x")]},
            [("system", ["S"]), ("user", ["Hi"]), ("assistant", ["x"])],
        ),
        (
            {
                "messages": [
                    message("user", [{"type": "image"}, {"type": "text", "text": "What is <video>?"}]),
                    message("assistant", [{"type": "text", "text": "Noise."}]),
                ],
                "images": ["a.png"],
            },
            [("user", ["[a.png]", "What is <video>?"]), ("assistant", ["Noise."])],
        ),
        ({"conversations": [{"from": None, "role": "user", "value": None, "content": "Hi"}, gpt("x")]},
         [("user", ["Hi"]), ("assistant", ["x"])]),
        (talk("a\u2028b\u2029c\x85d", "x\u2028y"), [("user", ["a\u2028b\u2029c\x85d"]), ("assistant", ["x\u2028y"])]),
        (talk("Hi", "Hello", "Bye"), [("user", ["Hi"]), ("assistant", ["Hello"])]),
    ],
)  # fmt: skip
def test_a_row_is_read(row: Any, expected: Any) -> None:
    assert turns_of(row) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat? ",
        "What?\n<image>",
        " What is <image> here?\n",
        "\n<image>What?",
        "A\n<image>\nB",
        "<image>",
        " <image> ",
        "<image>A<image>B",
        "A<image>B<image>",
        "A <video> in <image>",
        "none",
    ],
)
def test_a_lone_image_moves_to_the_front_of_its_turn(tmp_path: Path, text: str) -> None:
    """As in LLaVA's `preprocess_multimodal`, whose text is then split at `<image>` and the newline after it."""
    expected = text
    if text.count("<image>") == 1 and not text.startswith("<image>"):
        expected = ("<image>\n" + text.replace("<image>", "").strip()).strip()
    draw(tmp_path)
    paths = [f"{i}.png" for i in range(text.count("<image>"))]
    (row,) = read_conversations(write(tmp_path / "d.json", [talk(text, "x", image=paths)]), tmp_path)
    joined = "".join("<image>" if isinstance(part, Media) else part for part in row.turns[0].content)
    # The newline after the mark is that which closes the image's block.
    assert joined == expected.replace("<image>\n", "<image>")


def test_a_lone_image_among_parts_moves_too(tmp_path: Path) -> None:
    draw(tmp_path)
    parts = [{"type": "text", "text": "What is "}, {"type": "image", "image": "0.png"}, {"type": "text", "text": "?"}]
    row = {"messages": [message("user", parts), message("assistant", "x")]}
    (read,) = read_conversations(write(tmp_path / "d.json", [row]), tmp_path)
    assert read.turns[0].content == (Media("image", "0.png"), "What is ?")
    assert turns_of(row)[0][1] == ["What is ", "[0.png]", "?"], "other families keep the order"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"conversations": [{"from": ["human"], "value": "Hi"}, gpt("x")]}, "a turn from"),
        ({"conversations": [{"from": {"a": 1}, "value": "Hi"}, gpt("x")]}, "a turn from"),
        ({"conversations": [{"from": 7, "value": "Hi"}, gpt("x")]}, "a turn from '7'"),
        ({"conversations": [{"value": "Hi"}, gpt("x")]}, "a turn from 'None'"),
        ({"conversations": [human("Hi"), 3]}, "a turn from '3'"),
        ({"conversations": [human(["Hi", 3]), gpt("x")]}, "a turn's content is 3"),
        ({"conversations": [human({"type": ["text"]}), gpt("x")]}, "a turn's content is"),
        ({"conversations": [human([{"type": "image"}]), gpt("x")]}, "a turn's content is"),
        ({"conversations": [human("Hi"), gpt(None)]}, "a turn's content is null"),
        ({"system": ["S"], **HI}, "`system` is not text"),
        (
            {"system": "S", "conversations": [{"from": "system", "value": "T"}, human("Hi"), gpt("x")]},
            "both a system turn and",
        ),
        ({"conversations": [gpt("only me")]}, "no answer"),
        ({"conversations": {"from": "human"}}, "no list of `conversations`"),
        (talk("half \ud83d a character", "x"), "half a character"),
        (talk("Hi", "x\udc00"), "half a character"),
        ({"system": "\ud800", **HI}, "half a character"),
        (talk("Hi", " \n"), "an empty answer"),
        (talk("<image>", "x", image=["a.png", None]), "`image` is neither"),
        (talk("<image>", "x", image=["a.png", "b.png"]), "1 <image> marks for 2 images"),
        (talk("<image>", "x", video=["a.mp4", "b.mp4"]), "1 <video> marks for 2 videos"),
        (talk("Hi", "x", "<image>", image="a.png"), "after the last answer"),
    ],
)
def test_a_row_is_named(row: Any, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        parse_conversation(Record("d.json[3]", row))
    assert caught.value.where == "d.json[3]"


ROW = json.dumps({"conversations": [human("a\u2028b\x85"), gpt("x\u2028y")]}, ensure_ascii=False)
FILES: dict[str, bytes] = {
    "plain.jsonl": f"{ROW}\n{ROW}\n".encode(),
    "no-end.jsonl": f"{ROW}\n{ROW}".encode(),
    "blank.jsonl": f"\n{ROW}\n\n \n{ROW}\n\n".encode(),
    "crlf.jsonl": f"{ROW}\r\n{ROW}\r\n".encode(),
    "bom.jsonl": codecs.BOM_UTF8 + f"{ROW}\n{ROW}\n".encode(),
    "bom-blank.jsonl": codecs.BOM_UTF8 + f"\n{ROW}\n{ROW}\n".encode(),
    "bom.json": codecs.BOM_UTF8 + f"[{ROW}, {ROW}]".encode(),
    "list.json": f" \n[{ROW},\n{ROW}]".encode(),
    "utf16le.jsonl": codecs.BOM_UTF16_LE + f"{ROW}\n\n{ROW}\n".encode("utf-16-le"),
    "utf16be.jsonl": codecs.BOM_UTF16_BE + f"{ROW}\r\n{ROW}".encode("utf-16-be"),
    "utf16.json": f"[{ROW}, {ROW}]".encode("utf-16"),
    "utf32.jsonl": f"{ROW}\n{ROW}\n".encode("utf-32"),
    "rows.jsonl.gz": gzip.compress(f"{ROW}\n{ROW}\n".encode()),
    "utf16.jsonl.gz": gzip.compress(f"{ROW}\n{ROW}\n".encode("utf-16")),
    "list.json.gz": gzip.compress(f"[{ROW}, {ROW}]".encode()),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    found = read_conversations(tmp_path / name, tmp_path)
    expected = ({"role": "user", "content": ("a\u2028b\x85",)}, {"role": "assistant", "content": ("x\u2028y",)})
    assert [messages(one) for one in found] == [expected, expected]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (f"{ROW}\n\n{{'a': 1}}\n".encode(), r"d\.jsonl:3: malformed JSON"),
        (f"{ROW}\n{ROW} {ROW}\n".encode(), r"d\.jsonl:2: malformed JSON"),
        (f"{ROW}\n".encode() + b'{"a": "\xff"}\n', r"d\.jsonl:2: malformed JSON"),
        (f"{ROW}\n".encode("utf-16-le"), r"d\.jsonl:1: malformed JSON"),
        (codecs.BOM_UTF16_LE + f"{ROW}\nx\n".encode("utf-16-le"), r"d\.jsonl:2: malformed JSON"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8" * 3, r"d\.jsonl:1: malformed JSON"),
        (f"{ROW}\n{'[' * 100_000}\n".encode(), r"d\.jsonl:2: malformed JSON"),
        (b"[" * 100_000, r"d\.jsonl:1: malformed JSON"),
        (f'{ROW}\n{{"a": {"1" * 5000}}}\n'.encode(), r"d\.jsonl:2: malformed JSON"),
        (gzip.compress(f"{ROW}\n".encode(), mtime=0)[:-9], r"d\.jsonl: cannot read"),
        (b"", r"d\.jsonl: no row"),
    ],
)
def test_a_broken_line_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_conversations(tmp_path / "d.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["gone.png", "\ud800.png", "a\0.png", "", "."])
def test_an_image_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    data = write(tmp_path / "d.json", [talk("<image>Hi", "x", image=[name])])
    with refused(InputError, "d.json[0]"):
        read_conversations(data, tmp_path)


# Preferences

TRL = {"chosen": [message("assistant", "Hello")], "rejected": [message("assistant", "Go")]}
INSIDE = {key: [message("user", "Hi"), *TRL[key]] for key in TRL}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": [message("user", "Hi")], **TRL},
        {"prompt": [message("user", "Hi")], "chosen": "Hello", "rejected": "Go"},
        {"prompt": "Hi", **TRL},
        INSIDE,
        {"prompt": "Hi", **INSIDE},
        {"prompt": [message("user", "Hi")], **INSIDE},
        {"prompt": None, "conversations": [human("Hi")], "chosen": gpt("Hello"), "rejected": gpt("Go")},
        {"prompt": "Hi", "conversations": None, "chosen": "Hello", "rejected": "Go"},
        {"prompt": [message("user", [{"type": "text", "text": "Hi"}])], **TRL},
    ],
)
def test_a_pair_is_read(row: Any, tmp_path: Path) -> None:
    ((chosen, rejected),) = read_pairs(write(tmp_path / "d.json", [row]), tmp_path)
    for one, answer in ((chosen, "Hello"), (rejected, "Go")):
        assert [(m["role"], m["content"]) for m in messages(one)] == [("user", ("Hi",)), ("assistant", (answer,))]


def test_pairs_with_a_system_prompt_a_history_and_images(tmp_path: Path) -> None:
    draw(tmp_path)
    begin = [message("system", "S"), message("user", [{"type": "image"}, {"type": "text", "text": "Hi"}])]
    history = [*begin, message("assistant", "Ho"), message("user", "And?")]
    row = {"images": ["0.png"], "prompt": history, **TRL}
    ((chosen, _),) = read_pairs(write(tmp_path / "d.json", [row]), tmp_path)
    assert [m["role"] for m in messages(chosen)] == ["system", "user", "assistant", "user", "assistant"]
    assert messages(chosen)[1]["content"] == (IMAGE, "Hi")
    assert chosen.images == (tmp_path / "0.png",)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (TRL, "either `prompt` or `conversations`"),
        ({"prompt": "Hi", "conversations": [human("Hi")], "chosen": "a", "rejected": "b"}, "either `prompt`"),
        ({"prompt": "Bye", **INSIDE}, "another prompt"),
        ({**INSIDE, "rejected": [message("user", "Bye"), message("assistant", "Go")]}, "different prompts"),
        (
            {"prompt": "Hi", "chosen": [message("user", "a")], "rejected": [message("assistant", "b")]},
            "assistant's text",
        ),
        ({"prompt": "Hi", "chosen": [7], "rejected": "b"}, "a turn from '7'"),
        ({"prompt": "Hi", "chosen": [], "rejected": "b"}, "`chosen` and `rejected` have to be non-empty text"),
        ({"prompt": "Hi", "chosen": 4, "rejected": "b"}, "`chosen` and `rejected` have to be non-empty text"),
        ({"prompt": 4, "chosen": "a", "rejected": "b"}, "text or messages in `prompt`"),
        ({"prompt": [message(["user"], "Hi")], **TRL}, "a turn from"),
        ({"prompt": [message("assistant", "Hi")], **TRL}, "no answer"),
        (talk("x", "y", chosen="a", rejected="b"), "does not end with a human turn"),
        ([1], "not a JSON object"),
    ],
)
def test_a_pair_is_named(row: Any, what: str, tmp_path: Path) -> None:
    data = write(tmp_path / "d.json", [row])
    with pytest.raises(InputError, match=what) as caught:
        read_pairs(data, tmp_path)
    assert caught.value.where == f"{data}[0]"


# The commands


def pack(out: Path, kind: str, data: Path, model: Path, media: Path, **options: Any) -> ChatRows:
    options = {"long_share": 0.0, "max_frames": 8, "template": "own", "shard_tokens": 4096, **options}
    sources: dict[str, Any] = {kind: (data,)}
    config = PackChatConfig(out=out, model=str(model), media=media, target_length=4096, **sources, **options)
    run_pack_chat(plan_pack_chat(config), on_progress=lambda done, total, note: None)
    return ChatRows(out)


WRITTEN = [
    talk("What does <|im_end|> do?", "It ends a turn: <|im_end|>\n<|im_start|>user"),
    talk("An <image> element?", "<rss><image></image></rss> or <video>"),
    talk("Is it <|endoftext|>?", "no"),
]


def learned(ids: Any) -> list[int]:
    return [int(i) for i in ids if i != IGNORED]


@pytest.mark.parametrize("template", ["own", "chatml"])
def test_pack_chat_writes_control_tokens_of_turns_as_text(template: str, tiny_vlm: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_vlm)
    rows = pack(tmp_path / "out", "text", write(tmp_path / "d.json", WRITTEN), tiny_vlm, tmp_path, template=template)
    special = set(tokenizer.all_special_ids)
    (ids,) = [rows.row(i) for i in range(len(rows))]
    found = [tokenizer.convert_ids_to_tokens(int(i)) for i in ids if int(i) in special]
    assert set(found) == {"<|im_start|>", "<|im_end|>"}
    assert found.count("<|im_end|>") == found.count("<|im_start|>")
    assert found.count("<|im_end|>") == len(WRITTEN) * 3, "a system turn, as both templates write one, and two"
    said = tokenizer.decode(learned(rows.labels(0)))
    for row in WRITTEN:
        assert row["conversations"][1]["value"] + "<|im_end|>" in said


def test_align_writes_them_as_text_too(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    from lvctx.training.align_statistics import align_statistics

    plan = aligning.align(write(tmp_path / "d.json", WRITTEN), tmp_path / "vlm", tiny_lm, tiny_tower, steps=1, batch=3)
    assert align_statistics(plan, lambda done, total, note: None).visual_tokens == 0


def test_both_commands_read_one_table(tiny_vlm: Path, tmp_path: Path) -> None:
    draw(tmp_path)
    cell = {"bytes": (tmp_path / "0.png").read_bytes(), "path": "0.png"}
    table = pa.table(
        {"image": [cell, None], "conversations": [talk("<image>Hi", "x")["conversations"], HI["conversations"]]}
    )
    pq.write_table(table, tmp_path / "d.parquet")
    assert [len(c.images) for c in read_conversations(tmp_path / "d.parquet", tmp_path / "a")] == [1, 0]
    rows = pack(tmp_path / "out", "image", tmp_path / "d.parquet", tiny_vlm, tmp_path / "b")
    assert sorted(len(sample["media"]) for sample in rows.samples(0)) == [0, 1]
    assert [p.name for p in (tmp_path / "a").iterdir()] == [p.name for p in (tmp_path / "b").iterdir()]


def test_a_template_that_rewrites_is_named_before_any_training(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    import shutil

    lm = tmp_path / "lm"
    shutil.copytree(tiny_lm, lm)
    (lm / "chat_template.jinja").write_text(
        "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    data = write(tmp_path / "d.json", [HI, HI, talk("Hi", "Hello", "And?", "x")])
    with refused(InputError, "d.json[2]"):
        aligning.align(data, tmp_path / "vlm", lm, tiny_tower, steps=1, batch=1)


def test_an_image_named_by_its_whole_path(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw(tmp_path)
    data = write(tmp_path / "images" / "d.json", [talk("<image>Hi", "x", image=str(tmp_path / "0.png"))])
    plan = aligning.align(data, tmp_path / "vlm", tiny_lm, tiny_tower, steps=1, batch=1)
    assert plan.rows[0][0].images == (tmp_path / "0.png",)
