"""Ring attention: blocks, sharding, and loss and gradients against stock transformers and full attention."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forks import start_ranks
from support.refusals import refused
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, DeepseekV3Config

from lvctx.errors import InputError, UsageError
from lvctx.models.loss import IGNORED
from lvctx.parallel import hf_attention
from lvctx.parallel.block_attention import FlashCPU, Plain
from lvctx.parallel.context import ParallelContext, joined, make_context
from lvctx.parallel.ring_attention import Ring, blocks, ring_attention
from lvctx.parallel.zigzag import chunks_of, shard
from lvctx.training.text_rows import RowLoss, shard_row

lengths, worlds = st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 8])


def places(rank: int, world: int, length: int) -> list[int]:
    """Global place of each local token: the definition, from chunk numbers alone."""
    size = length if world == 1 else -(-length // (2 * world))
    return [c * size + i for c in chunks_of(rank, world) for i in range(size)]


@given(lengths, worlds)
def test_shards_hold_their_places_and_come_back_whole(length: int, world: int) -> None:
    whole = torch.arange(length)[None]
    shards = [shard(whole, rank=r, world=world, fill=-1) for r in range(world)]
    for rank, part in enumerate(shards):
        assert part[0].tolist() == [p if p < length else -1 for p in places(rank, world, length)]
    assert sorted(p for part in shards for p in part[0].tolist() if p >= 0) == list(range(length))
    assert len({s.shape for s in shards}) == 1


@given(lengths, worlds, st.none() | st.sets(st.integers(0, 59), max_size=8))
def test_every_pair_that_may_meet_meets_once(length: int, world: int, begins: set[int] | None) -> None:
    """The rectangles of all ranks and steps are the causal triangle, cut into documents, each pair once."""
    padded = len(places(0, world, length)) * world
    starts = None if begins is None else hf_attention.document_starts(sorted(b for b in begins if b < length))
    met = torch.zeros(padded, padded, dtype=torch.int)
    for rank in range(world):
        mine = places(rank, world, length)
        for source in range(world):
            theirs = places(source, world, length)
            for block in blocks(rank, source, world, len(mine), starts):
                for i in range(*block.queries):
                    seen = range(block.keys[0], i - block.queries[0] + block.keys[0] + 1) if block.causal else None
                    for j in seen or range(*block.keys):
                        met[mine[i], theirs[j]] += 1
    documents = torch.bucketize(torch.arange(padded), torch.tensor(starts or (0,)), right=True)
    allowed = torch.ones(padded, padded).tril().bool() & (documents[:, None] == documents)
    assert torch.equal(met, allowed.int())


@given(st.integers(2, 200), st.sampled_from([2, 4, 8]))
def test_without_documents_ranks_do_equal_work(length: int, world: int) -> None:
    def work(rank: int) -> float:
        size = len(places(rank, world, length))
        found = [b for source in range(world) for b in blocks(rank, source, world, size, None)]
        areas = [(b.queries[1] - b.queries[0]) * (b.keys[1] - b.keys[0]) * (0.5 if b.causal else 1) for b in found]
        return sum(areas)

    assert len({work(rank) for rank in range(world)}) == 1


@pytest.mark.parametrize("kernel", [FlashCPU(), Plain()], ids=lambda k: k.name)
def test_blocks_do_not_overflow(kernel: Any) -> None:
    """Scores of +-1e4: exp overflows, sigmoid does not. Expected from float64 with the row's maximum taken out."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 8) * s for s in (100, 100, 1))
    out = ring_attention(q, k, v, ring=Ring(), kernel=kernel, scale=1.0, starts=(0, 5))
    mask = torch.ones(24, 24).tril().bool()
    mask[5:, :5] = False
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=1.0)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


def tiny_config(kind: str, **changed: Any) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "sliding_window": None,
    }
    return AutoConfig.for_model(kind, **sizes | changed)


def tiny_model(kind: str, **changed: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changed), attn_implementation="sdpa")


def reference(
    lm: Any, ids: Tensor, labels: Tensor, starts: tuple[int, ...] | None, positions: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Stock transformers with full logits, torch's cross-entropy, and a document mask written out."""
    at = torch.arange(ids.shape[1])
    documents = torch.bucketize(at, torch.tensor(starts or (0,)), right=True)
    mask: Any = ((documents[:, None] == documents) & (at[:, None] >= at))[None, None]
    if window := getattr(lm.config, "sliding_window", None):
        near = mask & (at[:, None] - at < window)
        layered = getattr(lm.config, "layer_types", None)
        mask = {"full_attention": mask, "sliding_attention": near} if layered else near
        if starts is None:  # transformers makes its own
            mask = torch.ones_like(ids)
    logits = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORED, reduction="sum")
    lm.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in lm.named_parameters()}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES = [
    # model, length, where documents begin, changes of its configuration
    ("llama", 37, None, {"tie_word_embeddings": True}),
    ("llama", 64, (0, 1, 5, 8, 9, 31, 33, 60), {}),
    ("qwen2", 5, None, {"num_key_value_heads": 1}),
    ("qwen2", 51, (0, 17, 18, 50), {"tie_word_embeddings": True}),
    ("qwen3", 40, (0, 20), {"num_key_value_heads": 4}),
    ("mistral", 33, None, {}),
    ("qwen3_moe", 40, (0, 20), EXPERTS),
]

FOUR_OF_SIX: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6}
"""Heads for four ranks, and key heads of which they would have one and a half."""
MIXED = ["sliding_attention", "full_attention"]
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
NOT_PLAIN = [
    ("mistral", 37, None, {"sliding_window": 5}),
    ("mistral", 40, (0, 4, 9, 30), {"sliding_window": 5, "num_key_value_heads": 1}),
    ("qwen2", 33, None, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma3_text", 30, (0, 20), {"sliding_window": 6, "layer_types": MIXED, **FOUR_OF_SIX}),
    ("deepseek_v3", 21, (0, 8), {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2}),
]


def check_models(world: ParallelContext) -> None:
    plain, others = (CASES[:3], NOT_PLAIN) if world.ring.kind == "ulysses" else (CASES, NOT_PLAIN * (world.size == 1))
    if world.ring.kind == "both":  # windows and latent keys where the processes divide the key heads, so have no ring
        plain = CASES[:3]
        others = [
            case for case in (NOT_PLAIN[0], NOT_PLAIN[-1]) if case[3].get("num_key_value_heads", 2) % world.cp == 0
        ]
    for kind, length, starts, changed in [*plain, *others]:
        lm = tiny_model(kind, **changed)
        ids = torch.randint(0, 101, (1, length), generator=torch.Generator().manual_seed(1))
        labels = torch.where(torch.arange(length) % 5 == 2, IGNORED, ids)
        positions = torch.arange(length)[None]
        positions[:, length // 3 :] += 50  # the second chunk of a row under --pose
        expected_loss, expected = reference(lm, ids, labels, starts, positions)
        hf_attention.use(lm, where=kind, ring=world.ring)
        lm.zero_grad(set_to_none=True)
        given = shard_row(ids, world, starts, positions)
        given["labels"] = world.ring.shard(F.pad(labels[:, 1:], (0, 1), value=IGNORED), fill=IGNORED)
        total, count = RowLoss(lm)(**given)
        total.backward()
        loss, counted = (x / world.dp for x in world.sum([total.item(), count]))
        case = f"{kind}, {length} tokens, documents {starts}, cp {world.cp}, {world.ring.kind}"
        assert counted == (labels[:, 1:] != IGNORED).sum(), case
        assert loss == pytest.approx(expected_loss, rel=1e-5), case
        for name, p in lm.named_parameters():
            world.add_up(p.grad)
            off = (p.grad / world.dp - expected[name]).norm() / expected[name].norm()
            assert off < 1e-5, f"{case}: {name} off by {off:.1e}"


def check_kernels_in_half_precision(world: ParallelContext) -> None:
    """bfloat16 blocks merged in float32: as near to the truth as one bfloat16 kernel over the whole sequence."""
    torch.manual_seed(2)
    whole = [torch.randn(1, h, 48, 16).bfloat16() for h in (4, 2, 2, 4)]
    q, k, v, grad = whole
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    truth.backward(grad.double())
    parts = [shard(x, rank=world.ring.rank, world=world.cp, fill=0, dim=2) for x in whole]
    mine = [x.clone().requires_grad_() for x in parts[:3]]
    out = ring_attention(*mine, ring=world.ring, kernel=FlashCPU(), scale=0.25)
    out.backward(parts[3])
    for got, expected in zip([out, *(x.grad for x in mine)], [truth, *(x.grad for x in exact)], strict=True):
        part = shard(expected, rank=world.ring.rank, world=world.cp, fill=0, dim=2)
        assert (got.double() - part).norm() / part.norm() < 6e-3


def flash_attn_modules() -> dict[str, ModuleType]:
    """flash-attn's four kernel functions over torch's CPU kernels, with its layouts (B, L, H, D) and its signatures."""
    kernel = FlashCPU()

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor, None, None]:
        out, lse = kernel.forward(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> None:
        rows = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        found = kernel.backward(*rows, softmax_lse.contiguous(), causal=causal, scale=softmax_scale)
        for into, grad in zip((dq, dk, dv), found, strict=True):
            into.copy_(grad.transpose(1, 2))

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    kernels: dict[str, Callable[..., Any]] = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
    kernels |= {"_flash_attn_varlen_forward": forward, "_flash_attn_varlen_backward": backward}
    for name, function in kernels.items():
        setattr(interface, name, function)
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def check_package(world: ParallelContext) -> None:
    """The real ring-flash-attn gives what our ring gives, through the same integration.

    In bfloat16, as it is used: in float32 its gradient buffers alias what they add to (0.1.8).
    """
    with pytest.MonkeyPatch.context() as patch:  # for the package alone: transformers would take it for flash-attn
        for name, module in flash_attn_modules().items():
            patch.setitem(sys.modules, name, module)
        package = hf_attention.load_package()
    assert package is not None
    torch.manual_seed(3)
    whole = [torch.randn(1, h, 8 * world.cp, 8).bfloat16() for h in (4, 2, 2)]
    results = []
    for ours in (True, False):
        q, k, v = (
            shard(x, rank=world.ring.rank, world=world.cp, fill=0, dim=2).clone().requires_grad_() for x in whole
        )
        if ours:
            out = ring_attention(q, k, v, ring=world.ring, kernel=FlashCPU(), scale=0.3).transpose(1, 2)
        else:
            out = hf_attention.PackageRing(package)(q, k, v, world.ring, 0.3)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 1e-2


def check_refusals() -> None:
    with pytest.raises(UsageError, match="--cp 3 does not divide the run's 4 processes; start it with"):
        make_context(device="cpu", cp=3)


def all_checks(rank: int, store: Path) -> None:
    torch.set_num_threads(1)
    with joined(store, rank=rank, size=4):
        check_refusals()
        for cp in (1, 2, 4):
            world = make_context(device="cpu", cp=cp)
            assert (world.dp, world.dp_rank) == (4 // cp, rank // cp)
            check_models(world)
            check_kernels_in_half_precision(world)
            if cp > 1:
                check_package(world)
                check_models(make_context(device="cpu", cp=cp, cp_kind="ulysses"))
                check_models(make_context(device="cpu", cp=cp, cp_kind="both"))


def test_loss_and_every_gradient_are_those_of_full_attention(tmp_path: Path) -> None:
    """Four processes as 4 x 1, 2 x 2 and 1 x 4: padding, masked labels, documents, grouped queries, odd lengths."""
    start_ranks(all_checks, tmp_path / "store", ranks=4)


def test_one_process_is_the_identity() -> None:
    ids = torch.arange(9)[None]
    given = shard_row(ids, ParallelContext(device="cpu"), None)
    assert "shard" not in given
    assert torch.equal(given["ids"], ids)
    check_models(ParallelContext(device="cpu"))


def test_what_ulysses_cannot_divide_or_compute_is_refused() -> None:
    both = Ring(world=2, kind="ulysses")
    for ring, config in [
        (Ring(world=3, kind="ulysses"), tiny_config("llama")),
        (both, tiny_config("qwen3_next")),
        (both, tiny_config("gemma3_text", sliding_window=6, use_bidirectional_attention=True)),
    ]:
        with refused(InputError, "m"):
            hf_attention.check_ring(config, ring, where="m")
    with refused(InputError, "m"):
        hf_attention.use(AutoModel.from_config(tiny_config("gemma2", sliding_window=6)), where="m", ring=both)
    with pytest.raises(UsageError):
        make_context(device="cpu", cp=1, cp_kind="ulysses")


def test_a_sliding_window_is_refused() -> None:
    hf_attention.check_config(tiny_config("mistral"), where="m")
    hf_attention.check_config(tiny_config("qwen2"), where="m")
    windowed = tiny_config("mistral", sliding_window=16)  # two key heads
    hf_attention.check_ring(windowed, Ring(world=2, kind="both"), where="m")
    with refused(InputError, "m"):
        hf_attention.check_ring(windowed, Ring(world=4, kind="both"), where="m")
    with refused(InputError, "m"):
        hf_attention.check_ring(tiny_config("mistral", sliding_window=16), Ring(world=2), where="m")
    with refused(InputError, "m"):
        hf_attention.check_config(DeepseekV3Config(), where="m")


def test_a_run_of_one_refuses_context_parallelism() -> None:
    with pytest.raises(UsageError, match=r"--cp 2 does not divide the run's 1 process;.*torchrun"):
        make_context(device="cpu", cp=2)


def test_a_window_that_reaches_the_mask_alone_is_refused() -> None:
    """Qwen2-MoE's attention is not told of the window, and without a mask it would attend to everything."""
    windows = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}
    lm = tiny_model("qwen2_moe", num_hidden_layers=2, **windows)
    hf_attention.use(lm, where="model")
    with pytest.raises(InputError):
        lm(input_ids=torch.zeros(1, 40, dtype=torch.int64), use_cache=False)
