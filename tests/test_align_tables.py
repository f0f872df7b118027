"""Training data from datasets: the same samples, pixels and model as from the equivalent JSON."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import aligning
from support.aligning import draw, talk, write
from support.refusals import refused

from lvctx.data.chat_encoding import to_messages
from lvctx.data.conversations import read_conversations, read_pairs
from lvctx.errors import InputError

ROWS = [talk("<image>\nWhat?", "red", image="0.png"), talk("Hi.", "Hello."), talk("<image>\nAnd?", "no", image="1.png")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path)
    return tmp_path


def with_pictures(folder: Path) -> datasets.Dataset:
    """The rows as published multimodal datasets hold them: pictures inside, none where there is none."""
    cells = [str(folder / row["image"]) if "image" in row else None for row in ROWS]
    table = {"image": cells, "conversations": [row["conversations"] for row in ROWS]}
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def embedded(folder: Path) -> pa.Table:
    cells = [{"bytes": (folder / r["image"]).read_bytes(), "path": r["image"]} if "image" in r else None for r in ROWS]
    return pa.table({"image": cells, "conversations": [row["conversations"] for row in ROWS]})


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits"])
def test_a_dataset_reads_like_the_equivalent_json(folder: Path, kind: str) -> None:
    expected = read_conversations(write(folder / "data.json", ROWS), folder)
    data = folder / ("data.parquet" if kind == "parquet" else "data")
    if kind == "parquet":
        pq.write_table(embedded(folder), data)
    elif kind == "saved":
        with_pictures(folder).save_to_disk(data)
    else:
        datasets.DatasetDict({"train": with_pictures(folder)}).save_to_disk(data)
    for _ in range(2):  # the second time the pictures are there
        found = read_conversations(data, folder / "new" / "images")
        assert [to_messages(c, str) for c in found] == [to_messages(c, str) for c in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours.images) == len(theirs.images)
            for a, b in zip(ours.images, theirs.images, strict=True):
                assert Image.open(a).convert("RGB").tobytes() == Image.open(b).convert("RGB").tobytes()
    assert len(list((folder / "new" / "images").iterdir())) == 2
    assert found[2].where == f"{data}[2]"


def test_names_in_a_parquet_are_files_of_the_folder(folder: Path) -> None:
    row: dict[str, Any] = {"prompt": "<image>What?", "chosen": "red", "rejected": "blue", "images": ["1.png"]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "pairs.parquet")
    ((chosen, _),) = read_pairs(folder / "pairs.parquet", folder)
    assert chosen.images == (folder / "1.png",)


def test_it_trains_and_another_dataset_is_another_run(folder: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    with_pictures(folder).save_to_disk(folder / "data")
    plan = aligning.align(folder / "data", folder / "out", tiny_lm, tiny_tower, steps=1, batch=3)
    pq.write_table(embedded(folder), folder / "data.parquet")
    other = aligning.align(folder / "data.parquet", folder / "out2", tiny_lm, tiny_tower, steps=1, batch=3)
    assert plan.provenance.inputs["data"] != other.provenance.inputs["data"]
    trained = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "out2")]
    assert trained[0] == trained[1]


def test_what_is_no_dataset_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (folder / "empty").mkdir()
    (folder / "bad.parquet").write_bytes(b"no")
    for data in (Path("nobody/nothing"), folder / "empty", folder / "bad.parquet", folder / "gone.parquet"):
        with pytest.raises(InputError) as caught:
            read_conversations(data, folder)
        assert str(caught.value.where) == str(data)
    with refused(InputError, "somewhere/data.json"):
        read_conversations(Path("somewhere/data.json"), folder)
