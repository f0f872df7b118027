"""`torch.compile` of the decoder layers against eager layers: processor seconds of a training step, loss, gradients.

    python benchmarks/compile_layers.py [--layers 4] [--tokens 1024] [--rounds 3] [--recompute] [--dtype bfloat16]

Random weights in SmolLM2-135M's widths. The layers are the models' time: the head is the same in both and is left out,
so the loss is the mean square of the hidden states. Turns alternate in one process. `ratio` is the compiled layers'
median time over the eager ones', `first` the seconds of the first compiled step, `loss` and `gradient` the largest
relative differences. Needs a C++ compiler.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from lvctx.training.activations import checkpoint_layers
from lvctx.training.memory_model import Recomputation


def step(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        loss = hidden.float().square().mean()
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    a = parser.parse_args()
    torch.manual_seed(0)
    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = AutoConfig.for_model("llama", **widths, head_dim=64, num_hidden_layers=a.layers, vocab_size=1000)
    eager = AutoModel.from_config(config)
    compiled = copy.deepcopy(eager)
    for model in (eager, compiled):
        checkpoint_layers(model, Recomputation(kept_layers=0 if a.recompute else a.layers))
    for layer in compiled.layers:
        layer.compile()
    ids, dtype = torch.randint(0, 1000, (1, a.tokens)), getattr(torch, a.dtype)
    losses, firsts = [], []
    for model in (eager, compiled):
        began = time.process_time()
        losses.append(step(model, ids, dtype))
        firsts.append(round(time.process_time() - began, 1))
    pairs = zip(eager.parameters(), compiled.parameters(), strict=True)
    gradient = max(float((p.grad - q.grad).norm() / p.grad.norm()) for p, q in pairs)
    seconds: list[list[float]] = [[], []]
    for _ in range(a.rounds):
        for of, model in zip(seconds, (eager, compiled), strict=True):
            began = time.process_time()
            step(model, ids, dtype)
            of.append(time.process_time() - began)
    middle = [statistics.median(of) for of in seconds]
    found = {"eager": middle[0], "compiled": middle[1], "ratio": middle[1] / middle[0], "first": firsts[1]}
    found |= {"loss": abs(losses[1] / losses[0] - 1), "gradient": gradient}
    print(json.dumps({**vars(a), **{key: float(f"{value:.3g}") for key, value in found.items()}}))


if __name__ == "__main__":
    main()
