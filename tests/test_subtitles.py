"""Subtitles against FFmpeg's own demuxer or, where it has none, the formats; finding their files."""

import json
from pathlib import Path

import av
import pytest
from support.refusals import refused

from lvctx.errors import InputError
from lvctx.eval.benchmarks.subtitles import find_subtitles, read_subtitles
from lvctx.eval.benchmarks.video_files import find_video, video_stem

CUES = ((1.0, 2.0, "one"), (3.0, 4.0, "two"), (5.0, 6.0, "three"))
BARE = [f"00:00:0{start:.0f},000 --> 00:00:0{end:.0f},000\n{text}\n" for start, end, text in CUES]
PLAIN = "\n".join(f"{i}\n{cue}" for i, cue in enumerate(BARE, start=1))


def by_ffmpeg(path: Path) -> list[tuple[float, float, str]]:
    with av.open(str(path), format="srt") as container:
        stream = container.streams.subtitles[0]
        packets = [p for p in container.demux(stream) if p.size]
        return [
            (float(p.pts * p.time_base), float((p.pts + p.duration) * p.time_base), " ".join(bytes(p).decode().split()))
            for p in packets
        ]


SAME_AS_FFMPEG = {
    "plain": PLAIN,
    "no blank lines": PLAIN.replace("\n\n", "\n"),
    "no blank lines, no numbers": "".join(BARE),
    "no numbers": "\n".join(BARE),
    "more blank lines": PLAIN.replace("\n\n", "\n\n\n\n"),
    "blank after the number": PLAIN.replace("\n00:", "\n\n00:"),
    "blank after the times": PLAIN.replace(",000\n", ",000\n\n"),
    "blank inside a cue": PLAIN.replace("two", "two\n\ntwo again"),
    "several lines": PLAIN.replace("two", "two\nand\nmore"),
    "numbers as text": PLAIN.replace("two", "1984"),
    "out of order": PLAIN.replace("00:05", "00:00").replace("00:06", "00:01"),
    "overlapping": PLAIN.replace("00:00:02", "00:00:05"),
    "points": PLAIN.replace(",", "."),
    "coordinates": PLAIN.replace("02,000", "02,000  X1:40 X2:600 Y1:20 Y2:50"),
    "short times": PLAIN.replace("00:00:0", "0:0:"),
    "an arrow as text": PLAIN.replace("two", "a --> b"),
    "hours": PLAIN.replace("00:00:05", "100:00:05").replace("00:00:06", "100:00:06"),
}


@pytest.mark.parametrize("name", SAME_AS_FFMPEG)
@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\n")])
def test_cues_are_those_of_ffmpeg(name: str, encoding: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "v.srt").write_bytes(SAME_AS_FFMPEG[name].replace("\n", end).encode(encoding))
    expected = by_ffmpeg(tmp_path / "v.srt")
    found = read_subtitles(tmp_path / "v.srt")
    assert [(pytest.approx(a), pytest.approx(b), text) for a, b, text in expected] == list(found.lines)
    assert (len(expected), found.bad) == (3, 0)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("-->", "->"),
        PLAIN.replace(",", ":"),
        PLAIN.replace(",000", ""),
        PLAIN.replace(",000", ",000000"),
        PLAIN.replace("\n\n", "\n\u00a0\n"),
        PLAIN.replace("\n\n", "\n \t\n"),
        PLAIN + "\0\0\0",
        PLAIN + "\n4\n",  # a number without its cue: counted
        PLAIN.replace("one", '<i>one</i> {\\an8}<font color="#fff"></font>'),
        PLAIN.replace("\n\n", "\n\n\n").replace("1\n", "1\n", 1),
        "WEBVTT\nKind: captions\n\n" + PLAIN.replace(",", ".").replace("00:00:0", "00:0"),
        "WEBVTT - title\n\nSTYLE\n::cue {}\n\n"
        + PLAIN.replace(",", ".").replace("2\n00", "2\n\nNOTE a\nnote\n\nname\n00").replace("two", "<c.red>two</c>"),
    ],
)
def test_other_forms(text: str, tmp_path: Path) -> None:
    (tmp_path / "v.srt").write_bytes(text.encode())
    found = read_subtitles(tmp_path / "v.srt")
    assert found.lines == CUES
    assert found.bad == ("\n4\n" in text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_without_a_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "v.srt").write_bytes(PLAIN.replace("one", "eins ä \u2028 \x85.").encode(encoding))
    found = read_subtitles(tmp_path / "v.srt")
    assert [line[2] for line in found.lines] == ["eins ä \u2028 \x85.", "two", "three"]


def test_what_cannot_be_read_is_counted_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "v.srt"
    file.write_bytes(PLAIN.replace("one", "caf\xe9").encode("latin-1"))
    assert read_subtitles(file).bad == 1
    file.write_text(PLAIN.replace("00:00:03,000 --> 00:00:04,000", "three to four"))
    assert read_subtitles(file).bad == 1
    assert [line[2] for line in read_subtitles(file).lines] == ["one", "three"]
    file.write_text(PLAIN.replace("00:00:01,000 -->", "one to"))
    assert (read_subtitles(file).bad, len(read_subtitles(file).lines)) == (1, 2)
    file.write_text(PLAIN.replace("1\n00:00:01", "1\n-00:00:01"))
    assert read_subtitles(file).at([0.0]) == "one"
    for text in ("[Script Info]\n\n[Events]\nDialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,one\n", "words"):
        file.write_text(text)
        with refused(InputError, "v.srt"):
            read_subtitles(file)
    for text in ("", "\n\n", "WEBVTT\n"):
        file.write_text(text)
        assert read_subtitles(file).lines == ()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("&lt;two&gt; &amp; 3 < 4", "<two> & 3 < 4"),
        ("3 < 4 and 5 > 2", "3 < 4 and 5 > 2"),
        ("<b><i>x</i></b> <00:00:01.500>y", "x y"),
        ("{\\an8}x {y}", "x {y}"),
        ("x<", "x<"),
        ("&#" + "1" * 5000 + ";", "&#" + "1" * 5000 + ";"),
    ],
)
def test_markup(text: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "v.srt").write_text(PLAIN.replace("two", text))
    assert read_subtitles(tmp_path / "v.srt").at([3.5]) == shown


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "stem", "found"),
    [
        (["abc.srt", "abc.en.srt", "abc.vtt"], "abc", "abc.srt"),
        (["abc.en.srt", "abc.de.srt"], "abc", "abc.en.srt"),
        (["abc.en-US.vtt"], "abc", "abc.en-US.vtt"),
        (["abc.zh-Hans.srt"], "abc", "abc.zh-Hans.srt"),
        (["abc.SRT"], "abc", "abc.SRT"),
        (["abc.VTT", "abc.txt"], "abc", "abc.VTT"),
        (["v1.2.srt", "v1.srt"], "v1.2", "v1.2.srt"),
        (["v1.2.srt"], "v1", None),
        (["abcd.srt", "ab.srt"], "abc", None),
        (["[x]*.en.srt"], "[x]*", "[x]*.en.srt"),
        ([], "", None),
    ],
)
def test_subtitles_of_a_video(names: list[str], stem: str, found: str | None, tmp_path: Path) -> None:
    file = find_subtitles(files(tmp_path, *names), stem)
    assert (file and file.name) == found


def test_subtitles_of_several_languages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several languages .*abc\.de\.srt, abc\.fr\.srt"):
        find_subtitles(files(tmp_path, "abc.de.srt", "abc.fr.srt"), "abc")


NAMES = [
    *(
        "abc.mp4",
        "UP.MOV",
        "flv1.FLV",
        "ts1.ts",
        "-dash.mp4",
        "we ird [x].mp4",
        "w.webm",
        "talk.part2.mkv",
        "v1.2",
        "m.M2TS",
    ),
    "abc.srt", "abc.json", "abc.frames.safetensors", "below/deep/d.wmv", ".cache/abc.mkv", "notes.txt",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("abc", "abc.mp4"), ("abc.mp4", "abc.mp4"), ("abc.MP4", "abc.mp4"), ("abc.mov", "abc.mp4")),
        *(("UP.MOV", "UP.MOV"), ("UP.mov", "UP.MOV"), ("UP", "UP.MOV"), ("flv1.FLV", "flv1.FLV"), ("flv1", "flv1.FLV")),
        *(
            ("ts1", "ts1.ts"),
            ("ts1.ts", "ts1.ts"),
            ("-dash", "-dash.mp4"),
            ("we ird [x]", "we ird [x].mp4"),
            ("w", "w.webm"),
        ),
        *(("talk.part2", "talk.part2.mkv"), ("v1.2", "v1.2"), ("m", "m.M2TS"), ("d", "below/deep/d.wmv")),
        *(("deep/d", "below/deep/d.wmv"), ("./below/deep/d.wmv", "below/deep/d.wmv"), ("elsewhere/abc.mp4", "abc.mp4")),
        *(
            (name, None)
            for name in ("up", "gone", "talk", "notes", "", ".", "..", "/", "a\0b", "x" * 5000, "*", "cache/abc.mkv x")
        ),
    ],
)
def test_videos_are_found_by_stem(name: str, found: str | None, tmp_path: Path) -> None:
    files(tmp_path, *NAMES)
    if found is None:
        with pytest.raises(InputError, match="no video"):
            find_video(tmp_path, name)
    else:
        assert find_video(tmp_path, name) == tmp_path / found


def test_of_two_videos_the_nearer_is_taken_and_equals_are_refused(tmp_path: Path) -> None:
    files(tmp_path, "a/x.mp4", "b/x.mp4", "y.mp4", "a/y.mp4", "z.mkv", "z.mp4", "e\u0301.mp4")
    assert find_video(tmp_path, "a/x") == tmp_path / "a/x.mp4"
    assert find_video(tmp_path, "y.mp4") == tmp_path / "y.mp4"
    assert find_video(tmp_path, "z.mp4") == tmp_path / "z.mp4"
    assert find_video(tmp_path, "\u00e9") == tmp_path / "e\u0301.mp4"
    with pytest.raises(InputError, match=r"two videos for x: a/x\.mp4 and b/x\.mp4"):
        find_video(tmp_path, "x")
    with pytest.raises(InputError, match=r"two videos for z: z\.mkv and z\.mp4"):
        find_video(tmp_path, "z")


def test_a_stem_keeps_other_dots() -> None:
    assert [video_stem(name) for name in ("a/v1.2.mp4", "v1.2", "UP.MOV", "x.ts", ".mp4")] == [
        "v1.2",
        "v1.2",
        "UP",
        "x",
        ".mp4",
    ]


def test_words_become_lines_of_a_sentence(tmp_path: Path) -> None:
    """Video-MME-v2's form. A sentence ends a line, and so does a pause; malformed rows are counted."""
    words = [("Hi\u2028there.", 0, 0.5), ("Who", 1, 1.2), ("is", 1.3, 1.4), ("it?", 3, 3.5)]
    rows = [json.dumps({"text": t, "start_time": a, "end_time": b}, ensure_ascii=False) for t, a, b in words]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "no JSON", "[" * 100_000, '{"text": "x"}']), encoding="utf-8")
    read = read_subtitles(tmp_path / "a.jsonl")
    assert [(start, end) for start, end, _ in read.lines] == [(0, 0.5), (1, 1.4), (3, 3.5)]
    assert [text.split() for _, _, text in read.lines] == [["Hi", "there."], ["Who", "is"], ["it?"]]
    assert read.bad == 3
