"""Memory and time of a training step, computed from config.json alone, without torch or weights.

Symbols: E hidden width, I inner width, H query heads, K key heads, D channels of a head, V vocabulary; P parameters,
W devices, C devices that share a row, S tokens of a row, s = S / C tokens of a row on one device; c bytes of a value in
matrix products: 2 (bfloat16) or 4 (float32).

Persistent, sharded over W devices (Rajbhandari et al. 2020, ZeRO 3), or on the host with offload:
    parameters 4P/W (float32), gradients 4P/W, optimizer 8P/W (AdamW's two moments)
    LoRA: 2P/W frozen in bfloat16 (4P on one device with c = 4), and the above for its own parameters only
Copies for computation: on one device autocast's of every weight, 2P, none with c = 4; sharded, embedding and head (kept
from forward to backward), and two layers, the current and the prefetched one, c bytes each. Their gradients before
the reduction: c of embedding and head, c and float32 of a layer.
Activations per token: w = 2 bytes per value of the hidden state (4 with c = 4, and on one device, where float32 weights
determine it).
    a layer's input, all that checkpointing keeps: w E
    inside a layer, for its backward: norms and residual 18 E (22 E for w = 4), q k v and attention's output
    2 c (H + K) D + 4 H, the gated MLP 4 c I
    during the backward of a layer: 3 c I + 2 w E
    with tiled MLPs: 7 c I only for the tokens of a tile, and 2 c E for the tiles' outputs and input gradients
Loss: hidden states and their gradient, 2 w E per token; logits of one chunk of 1,024 tokens, V times 6 bytes (bfloat16
and float32; 4 with c = 4); and the head's gradient, which is computed with the loss. Full logits, as in a plain
forward, are 12 V per token of a row (bfloat16, float32, and the gradients of both).
Ring (C > 1): keys and values twice in bfloat16 and their gradients twice in float32, queries' gradient and output in
float32: s (24 K D + 8 H D).
Ulysses (C > 1): key heads are repeated to K' = lcm(K, C), 2 (K' - K) more than counted above. Attention's gradients of
q k v, and two copies of the largest while it is sent and received: s c D (3 H + 4 K' - 2 K).
Operations: 2 per weight and token except for the embedding, 2 S H D per token and layer for causal attention, three
times that with the backward pass; checkpointing repeats the forward, which MFU does not count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from lvctx.device import CpKind
from lvctx.errors import InputError

LOGITS_CHUNK = 1024
"""Number of tokens whose logits exist at a time."""

MLP_TILE = 4096
"""Number of tokens whose MLP is computed at a time where MLPs are tiled."""

GIB = 1 << 30
PLANNED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with layers as above."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or this machine."""

    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16 operations per second, the vendor's figure; 0 if there is none."""
    runtime: int
    """Bytes used by the process itself: context, libraries, collectives."""
    usable: float = 0.9
    """Fraction of the memory that may be filled with activations in order not to recompute them."""


DEVICES = {
    "a100": Device(memory=80 * GIB, flops=312e12, runtime=3 * GIB // 2),
    "h100": Device(memory=80 * GIB, flops=989e12, runtime=3 * GIB // 2),
    "h200": Device(memory=140 * GIB, flops=989e12, runtime=3 * GIB // 2),
    "cpu": Device(memory=16 * GIB, flops=0.0, runtime=GIB // 2, usable=0.5),
}


def known_device(name: str) -> str | None:
    """Key in DEVICES of the device with this driver name; None for others."""
    return next((key for key in DEVICES if key in name.lower()), None)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder with RoPE, grouped-query attention and a gated MLP."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether embedding and head share one matrix."""
    attention_extra: int
    """Parameters of a layer's attention besides its four matrices: biases, norms of queries and keys."""
    mlp_extra: int
    """Biases of a layer's MLP."""

    @property
    def attention(self) -> int:
        """Weights of a layer's four projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.key_heads)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        mlp = 3 * self.hidden * self.inner
        return self.attention + self.attention_extra + mlp + self.mlp_extra + 2 * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.layers * self.layer + self.root

    def lora(self, rank: int) -> int:
        """Parameters of LoRA on the attention's projections."""
        sides = 4 * self.hidden + 2 * self.head_dim * (self.heads + self.key_heads)
        return self.layers * rank * sides


def read_shape(config: Mapping[str, Any], *, where: object) -> DecoderShape:
    """The shape described by a config.json. Raises InputError for an unsupported model or a missing number."""
    kind = config.get("model_type")
    if kind not in PLANNED_TYPES:
        raise InputError(f"{kind} models are not supported", where=where, fix=f"give one of {', '.join(PLANNED_TYPES)}")

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if value is None:
            raise InputError(f"config.json lacks {key!r}", where=where)
        if type(value) is not int or value < 1:
            raise InputError(f"{key} is {value!r}", where=where, fix="correct config.json")
        return value

    hidden, inner, heads = (size(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    layers, vocab = size("num_hidden_layers"), size("vocab_size")
    key_heads, dim = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    biased = kind == "qwen2" or bool(config.get("attention_bias"))
    extra = dim * (heads + 2 * key_heads) if biased else 0
    extra += hidden if biased and kind != "qwen2" else 0  # the output projection's
    extra += 2 * dim if kind == "qwen3" else 0
    return DecoderShape(
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head_dim=dim,
        vocab=vocab,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_extra=extra,
        mlp_extra=2 * inner + hidden if config.get("mlp_bias") else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """What the backward pass recomputes."""

    kept_layers: int = 0
    """Layers, the last ones, whose activations are kept; the other layers are recomputed."""
    mlp_tiles: bool = False
    """The MLP is computed for MLP_TILE tokens at a time, and each tile is recomputed."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The layout of a run."""

    world: int = 1
    """Devices."""
    cp: int = 1
    """Devices that share a row."""
    cp_kind: CpKind = "ring"
    """How they attend."""
    rows: int = 1
    """Rows that one device processes consecutively in a step."""
    recomputation: Recomputation = Recomputation()
    """What the backward pass recomputes."""
    offload: bool = False
    """Parameters, gradients and optimizer state are kept on the host."""
    offload_activations: bool = False
    """Layers' inputs are kept on the host."""
    lora: int = 0
    """Rank of LoRA on attention; 0 trains everything."""
    compute_bytes: int = 2
    """Bytes of a value in matrix products: 2 for bfloat16, 4 for float32."""
    full_logits: bool = False
    """Logits of all tokens, as in a plain forward; ours are computed in chunks."""


def rows_together(seq_len: int, micro_tokens: int, rows: int) -> int:
    """Rows of one forward: as many whole ones as fit, at least one, at most the `rows` of a device's step."""
    return max(1, min(micro_tokens // seq_len, rows))


def memory(shape: DecoderShape, spread: Spread, seq_len: int, *, runtime: int) -> tuple[dict[str, int], int, int]:
    """Bytes of one device by part, its peak, and the bytes of its process on the host.

    Not all parts exist at once: the peak is the largest of three moments: the loss, a layer's backward, and the
    reduction of the last gradients.
    """
    world, alone, c = spread.world, spread.world == 1 and not spread.offload, spread.compute_bytes
    total = shape.parameters
    trained = shape.lora(spread.lora) if spread.lora else total
    frozen = total if spread.lora else 0
    parameter_bytes = 4 * trained + (c if alone else 2) * frozen
    state_bytes = {
        "parameters": parameter_bytes // world,
        "gradients": 4 * trained // world,
        "optimizer": 8 * trained // world,
    }
    host = 0
    if spread.offload:
        host, state_bytes = sum(state_bytes.values()), dict.fromkeys(state_bytes, 0)
    if alone:
        copies, late, last = (0 if spread.lora or c == 4 else 2 * total), 0, 0
    else:
        copies = c * shape.root + 2 * c * shape.layer
        late = 0 if spread.lora else c * shape.root + (c + 4) * shape.layer
        last = 0 if spread.lora else c * shape.root + (c + 4) * shape.root
    w = 4 if c == 4 or (alone and not spread.lora) else 2
    tokens = -(-seq_len // spread.cp)
    stored, layer, moved = _activations(shape, spread, tokens, w)
    host += moved
    if spread.full_logits:
        logits = 12 * shape.vocab * tokens
    else:
        logits = (6 if c == 2 else 4) * shape.vocab * min(tokens, LOGITS_CHUNK)
        logits += 0 if spread.lora else (4 if alone else c) * shape.vocab * shape.hidden
    loss = logits + 2 * w * shape.hidden * tokens
    shared = tokens * _sharing(shape, spread) if spread.cp > 1 else 0
    parts = {
        **state_bytes,
        "compute_copies": copies + late,
        "activations": stored + layer,
        "loss": loss,
        "ring_buffers" if spread.cp_kind == "ring" else "all_to_all_buffers": shared,
        "runtime": runtime,
    }
    accumulated = state_bytes["gradients"] if spread.rows > 1 else 0
    always = state_bytes["parameters"] + state_bytes["optimizer"] + runtime
    copied = 0 if alone else copies  # autocast drops its copies before the backward pass
    peak = always + max(
        accumulated + copies + stored + loss,
        state_bytes["gradients"] + copied + late + stored + layer + shared,
        state_bytes["gradients"] + last + copied,
    )
    return parts, peak, host


def _sharing(shape: DecoderShape, spread: Spread) -> int:
    """Bytes per token that context parallelism adds to a layer's backward."""
    if spread.cp_kind == "ring":
        return shape.head_dim * (24 * shape.key_heads + 8 * shape.heads)
    key_heads = lcm(shape.key_heads, spread.cp)
    return spread.compute_bytes * shape.head_dim * (3 * shape.heads + 4 * key_heads - 2 * shape.key_heads)


def _activations(shape: DecoderShape, spread: Spread, tokens: int, w: int) -> tuple[int, int, int]:
    """Bytes of the activations that wait for the backward pass, of one layer's backward, and of inputs on the host."""
    c, kept, tiled = spread.compute_bytes, spread.recomputation.kept_layers, spread.recomputation.mlp_tiles
    inputs, host = (shape.layers - kept) * w * shape.hidden * tokens, 0
    mlp_tokens = min(tokens, MLP_TILE) if tiled else tokens
    inside = (22 if w == 4 else 18) * shape.hidden + 4 * shape.heads
    inside += 2 * c * (shape.heads + shape.key_heads) * shape.head_dim + 2 * c * shape.hidden * tiled
    inside = inside * tokens + (0 if tiled else 4 * c * shape.inner * tokens)
    back = 2 * w * shape.hidden * tokens + (7 if tiled else 3) * c * shape.inner * mlp_tokens
    if spread.offload_activations and inputs:
        host, inputs = inputs, 2 * w * shape.hidden * tokens
    stored = inputs + kept * inside
    # When the backward pass reaches the first layer to recompute, the kept layers' activations are free again.
    layer = max(back if kept else 0, inside + back - kept * inside if kept < shape.layers else 0)
    return stored, layer, host


def least_recomputation(shape: DecoderShape, spread: Spread, seq_len: int, device: Device) -> Recomputation:
    """As many layers kept as fit into the usable memory; if none fits, every layer recomputed, with tiled MLPs.

    With `offload_activations` no layer is kept: the inputs of all are on the host.
    """
    most = 0 if spread.offload_activations else shape.layers
    for kept in range(most, -1, -1):
        found = Recomputation(kept_layers=kept)
        peak = memory(shape, replace(spread, recomputation=found), seq_len, runtime=device.runtime)[1]
        if peak <= device.usable * device.memory:
            return found
    return Recomputation(mlp_tiles=True)


def flops(shape: DecoderShape, seq_len: int, tokens: int, *, lora: bool = False) -> float:
    """Operations of a step over `tokens` in rows of `seq_len`: forward and backward, without recomputation.

    With LoRA the frozen weights have no gradients.
    """
    weights = shape.layers * (shape.attention + 3 * shape.hidden * shape.inner) + shape.vocab * shape.hidden
    attention = 2 * shape.layers * shape.heads * shape.head_dim * seq_len
    return float(tokens) * ((2 if lora else 3) * 2 * weights + 3 * attention)


def longest(shape: DecoderShape, spread: Spread, device: Device) -> int:
    """Tokens of the longest row that fits, a multiple of 1,024 per device that shares it; 0 if none does."""
    step = 1024 * spread.cp

    def fits(steps: int) -> bool:
        return memory(shape, spread, steps * step, runtime=device.runtime)[1] <= device.memory

    low, high = 0, 1
    while fits(high) and high < 1 << 30:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def remedies(shape: DecoderShape, spread: Spread, seq_len: int, device: Device) -> list[tuple[str, int]]:
    """Flags that each lower the peak, with the resulting peak; the smallest change first."""
    tried = []
    if not spread.recomputation.mlp_tiles:
        tiled = Recomputation(mlp_tiles=True)
        tried.append(("--checkpoint-activations tiles", replace(spread, recomputation=tiled)))
    tried += [
        (f"--cp {cp}", replace(spread, cp=cp))
        for cp in range(spread.cp + 1, spread.world + 1)
        if spread.world % cp == 0 and (spread.cp_kind == "ring" or shape.heads % cp == 0)
    ]
    if not spread.offload:
        tried.append(("--offload", replace(spread, offload=True)))
    if spread.recomputation.kept_layers < shape.layers and not spread.offload_activations:
        tried.append(("--offload-activations", replace(spread, offload_activations=True)))
    if not spread.lora:
        tried.append(("--lora 16", replace(spread, lora=16)))
    peaks = [(flag, memory(shape, other, seq_len, runtime=device.runtime)[1]) for flag, other in tried]
    unchanged_peak = memory(shape, spread, seq_len, runtime=device.runtime)[1]
    return [(flag, peak) for flag, peak in peaks if peak < unchanged_peak]
