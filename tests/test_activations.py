"""What stays in memory between forward and backward, and that gradients do not depend on it."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_ring import tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from lvctx.training import activations
from lvctx.training.activations import checkpoint_layers
from lvctx.training.memory_model import Recomputation

FORWARD = """
import os
import torch
from transformers import LlamaConfig, LlamaModel
from lvctx.training.activations import checkpoint_layers
from lvctx.training.memory_model import Recomputation

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
model = LlamaModel(config)
checkpoint_layers(model, Recomputation())
ids = torch.zeros(1, 4096, dtype=torch.long)
with torch.no_grad():
    model(input_ids=ids[:, :64], use_cache=False)  # libraries load what they need
before = resident()
hidden = model(input_ids=ids, use_cache=False).last_hidden_state
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_insides_go_back_to_the_system() -> None:
    """Thirteen float32 hidden states of 4,096 x 256, and at most one layer's inside (two of 4,096 x 1,024)."""
    done = subprocess.run([sys.executable, "-c", FORWARD], capture_output=True, text=True, check=True)
    state, inside = 4 * 4096 * 256, 2 * 4 * 4096 * 1024
    assert 12 * state < int(done.stdout) < 13 * state + inside


@pytest.mark.parametrize(
    ("recomputation", "passes"),
    [
        (Recomputation(), 4),
        (Recomputation(kept_layers=1), 3),
        (Recomputation(kept_layers=2), 2),
        # Seven tiles of up to 4 of 25 tokens: forward, in the layer's recomputation, which ends with the input of the
        # last one, and on their own.
        (Recomputation(mlp_tiles=True), 2 * (7 + 6 + 7)),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_without_recomputation(
    recomputation: Recomputation, passes: int, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, except where a weight's gradient is a sum over tiles."""
    counted, plain_forward = [0], LlamaMLP.forward

    def forward(self: LlamaMLP, x: Any) -> Any:
        counted[0] += 1
        return plain_forward(self, x)

    plain = tiny_model("llama", num_hidden_layers=2)
    ours = copy.deepcopy(plain)
    ids = torch.randint(0, 90, (2, 25), generator=torch.Generator().manual_seed(0))
    plain(input_ids=ids, labels=ids).loss.backward()
    monkeypatch.setattr(activations, "MLP_TILE", 4)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    checkpoint_layers(ours.model, recomputation, offload=offload)
    ours(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counted[0] == passes
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        tolerance = 1e-6 if recomputation.mlp_tiles else 0
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=tolerance, atol=tolerance)
