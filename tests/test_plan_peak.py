"""The predicted peak of a training step against all tensors that exist in one, by every operation that makes one."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM

from lvctx.models.lora import ATTENTION, add_lora
from lvctx.models.loss import shift_labels
from lvctx.training.activations import checkpoint_layers
from lvctx.training.decoder_shape import read_shape
from lvctx.training.memory_model import Recomputation, Spread, memory
from lvctx.training.text_rows import RowLoss

LAYERS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 2000, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 192, "intermediate_size": 384, "vocab_size": 500, "tie_word_embeddings": False},
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that exist, and the most so far."""

    def __init__(self, parameters: Any) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for parameter in parameters:
            self._add(parameter)

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)
        return tensor

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self._add, func(*args, **(kwargs or {})))


@pytest.mark.parametrize("kept", [0, LAYERS])
@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(("kind", "tokens"), [("llama", 1152), ("qwen3", 384)])
def test_the_peak_of_a_step_is_that_of_its_tensors(kind: str, lora: int, kept: int, tokens: int) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model(kind, **SHAPES[kind], **heads, pad_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    if lora:
        model.requires_grad_(False)
        add_lora(model.get_decoder(), rank=lora, targets=ATTENTION, seed=0)
    recomputation = Recomputation(kept_layers=kept)
    checkpoint_layers(model.get_decoder(), recomputation)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    row = {"ids": ids, "labels": shift_labels(ids), "positions": torch.arange(tokens)[None]}
    row_loss = RowLoss(model)
    with LiveBytes(model.parameters()) as live:
        for _ in range(2):  # the optimizer's state exists from the second step on
            with torch.autocast("cpu", torch.bfloat16):
                total, _count = row_loss(**row)
            total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    shape = read_shape(config.to_dict(), where="")
    _, peak, _ = memory(shape, Spread(recomputation=recomputation, lora=lora), tokens, runtime=0)
    assert peak == pytest.approx(live.peak, rel=0.15)
