"""What a CUDA device has to agree on with the CPU. Skipped, with the reason, where there is none: `make test-gpu`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvctx.bench.prefix import PrefixScorer
from lvctx.model.load import load_model
from lvctx.model.loss import shift_labels, token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_needles_score_alike(tiny_lm: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 200)
    here, there = (PrefixScorer(load_model(tiny_lm, device=d), chunk=64).score(ids, 5) for d in ("cpu", "cuda"))
    assert there.log_prob == pytest.approx(here.log_prob, abs=1e-2)
    assert there.forced == here.forced


def test_loss_and_gradients_agree(tiny_lm: Path) -> None:
    ids = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    gradients = []
    for device in ("cpu", "cuda"):
        model = load_model(tiny_lm, device=device)
        hidden = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        total, _ = token_loss(hidden[0], model.lm_head.weight, shift_labels(ids.to(device))[0])
        total.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3)
