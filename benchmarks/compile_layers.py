"""`torch.compile` of the decoder layers against eager layers: processor seconds of a training step, loss, gradients.

    python benchmarks/compile_layers.py [--layers 4] [--tokens 1024] [--rounds 3] [--recompute] [--dtype bfloat16]

Random weights in SmolLM2-135M's widths. The layers are the models' time: the head is the same in both and is left out,
so the loss is the mean square distance of the hidden states to random numbers. (Without these it is 1 after the last
norm whatever the layers do: its gradient is what is left of numbers that cancel, and rounding decides its third digit.)
Turns alternate in one process. `ratio` is the compiled layers' median time over the eager ones', `first` the seconds of
the first compiled step. `loss` is the relative difference, `gradient` the largest of any parameter: the norm of the
difference over the gradient's norm. `eager64` and `compiled64` are the largest to the same layers in float64.
Needs a C++ compiler.
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
from lvctx.training.compiled_layers import compile_layers
from lvctx.training.memory_model import Recomputation


def step(model: Any, ids: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> float:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        loss = (hidden.to(target.dtype) - target).square().mean()
    loss.backward()
    return loss.item()


def largest_difference(model: Any, other: Any, norms: Any) -> float:
    """Of all parameters, the largest norm of the gradients' difference, relative to the gradient's norm in `norms`."""
    triples = zip(model.parameters(), other.parameters(), norms.parameters(), strict=True)
    return max(float((p.grad.double() - q.grad.double()).norm() / r.grad.norm()) for p, q, r in triples)


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
    compiled, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    for model in (eager, compiled, exact):
        checkpoint_layers(model, Recomputation(kept_layers=0 if a.recompute else a.layers))
    compile_layers(compiled)
    ids, dtype = torch.randint(0, 1000, (1, a.tokens)), getattr(torch, a.dtype)
    target = torch.randn(a.tokens, config.hidden_size)
    step(exact, ids, target.double(), torch.float64)
    losses, firsts = [], []
    for model in (eager, compiled):
        began = time.process_time()
        losses.append(step(model, ids, target, dtype))
        firsts.append(round(time.process_time() - began, 1))
    gradients = {
        "gradient": largest_difference(compiled, eager, exact),
        "eager64": largest_difference(eager, exact, exact),
        "compiled64": largest_difference(compiled, exact, exact),
    }
    seconds: list[list[float]] = [[], []]
    for _ in range(a.rounds):
        for of, model in zip(seconds, (eager, compiled), strict=True):
            began = time.process_time()
            step(model, ids, target, dtype)
            of.append(time.process_time() - began)
    middle = [statistics.median(of) for of in seconds]
    found = {"eager": middle[0], "compiled": middle[1], "ratio": middle[1] / middle[0], "first": firsts[1]}
    found |= {"loss": abs(losses[1] / losses[0] - 1), **gradients}
    print(json.dumps({**vars(a), **{key: float(f"{value:.3g}") for key, value in found.items()}}))


if __name__ == "__main__":
    main()
