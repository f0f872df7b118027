"""Only the layers' inputs stay in memory between a checkpointed forward and its backward."""

import subprocess
import sys

import pytest

FORWARD = """
import os
import torch
from transformers import LlamaConfig, LlamaModel
from lvctx.training.activations import checkpoint_layers

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
model = LlamaModel(config)
checkpoint_layers(model, offload=False)
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
