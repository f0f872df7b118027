"""The speed of a step in metrics.jsonl."""

import pytest
import torch

from lvctx.parallel.context import ParallelContext
from lvctx.training import throughput
from lvctx.training.memory_model import known_device


def test_speed_is_tokens_over_seconds_and_mfu_needs_a_known_device() -> None:
    held = torch.ones(1 << 20)  # the process holds at least this
    row = throughput.measure(ParallelContext(device="cpu"), tokens=3000, seconds=1.5, flops=1e9)
    assert (row["seconds"], row["tokens_per_second"], row["mfu"]) == (1.5, 2000.0, None)
    assert row["memory_bytes"] > held.nbytes


def test_mfu_is_the_share_of_the_vendors_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    row = throughput.measure(ParallelContext(device="cuda:0"), tokens=100, seconds=2.0, flops=989e12)
    assert row["mfu"] == 0.5  # half of 2 s at 989 TFLOP/s
    assert throughput.note({**row, "loss": 2.0}) == "loss 2.000, 50 tokens/s, 3.0 GiB, MFU 50%"


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", None)],
)
def test_devices_are_known_by_their_drivers_name(name: str, key: str | None) -> None:
    assert known_device(name) == key
