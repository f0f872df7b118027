"""Memory and time of a training step, computed from config.json alone, without torch or weights.

Symbols: E hidden width, I inner width, H query heads, K key heads, D channels of a head, V vocabulary; P parameters,
W devices, C devices that share a row, S tokens of a row, s = S / C tokens of a row on one device; c bytes of a value in
matrix products: 2 (bfloat16) or 4 (float32).

Persistent, sharded over W devices (Rajbhandari et al. 2020, ZeRO 3), or on the host with offload:
    parameters 4P/W (float32), gradients 4P/W, optimizer 8P/W (AdamW's two moments)
    LoRA: 2P/W frozen in bfloat16 (4P on one device with c = 4), and the above for its own parameters only
Copies for computation: on one device autocast's of every weight that multiplies, 2P, none with c = 4; sharded,
embedding and head (kept from forward to backward), and two layers, the current and the prefetched one, c bytes each.
Their gradients before the reduction: c of embedding and head, c and float32 of a layer.
Activations per token: w = 2 bytes per value of the hidden state (4 with c = 4, and on one device, where float32 weights
determine it).
    a layer's input, all that checkpointing keeps: w E
    inside a layer, for its backward: of each norm its input in float32, 4 E, and if trained what its weight multiplies,
    w E (4 E in Gemma); the inputs of q k v and of gate and up, c E each, but autocast copies E for each of the five;
    q k v and attention's output 2 c (H + K) D + 4 H; norms of q k 4 (H + K) D, trained c (H + K) D more; the gated
    MLP 4 c I. With LoRA the frozen MLP keeps no inputs, 3 c I; autocast copies attention's output for LoRA, c H D
    during the backward of a layer: 3 c I + 2 w E
    with tiled MLPs: 7 c I only for the tokens of a tile, and 2 c E for the tiles' outputs and input gradients
    experts, k of X for each token: k (4 w I + 2 w E + 34) + 4 X instead of 4 c I, frozen k (3 w I + w E + 34) + 4 X;
    and k (3 w I + 2 w E) in the backward
Sliding windows of N tokens: their masks, 2 c N per token of the row, and keys and values repeated for every query head,
2 c (H - K) D. Every layer is counted as one with a window.
Loss: per token the last norm as above, its output w E, the counted hidden states and their gradient 2 c E; logits of
one chunk of 1,024 tokens, V times 6 bytes (bfloat16 and float32; 4 with c = 4), or where that is more, on one device
with c = 2, their gradient and its product for the head, 2 V per token and 2 V E; and the head's gradient, which is
computed with the loss. Full logits, as in a plain forward, are 12 V per token of a row (bfloat16, float32, and the
gradients of both).
Ring (C > 1): keys and values twice in bfloat16 and their gradients twice in float32, queries' gradient and output in
float32: s (24 K D + 8 H D).
Ulysses (C > 1): key heads are repeated to K' = lcm(K, C), 2 (K' - K) more than counted above. Attention's gradients of
q k v, and two copies of the largest while it is sent and received: s c D (3 H + 4 K' - 2 K).
Both: as the ring, or as Ulysses where C divides K, and a copy of the output's gradient in the other order: s c H D.
Operations: 2 per weight and token except for the embedding and the experts that do not see it; causal attention 4 H D
per token, layer and key, of which there are S / 2 on average, in a window of N tokens N - N^2 / 2S; three times that
with the backward pass; checkpointing repeats the forward, which MFU does not count.
"""

from dataclasses import dataclass, replace
from math import gcd, lcm

from lvctx.device import CpKind
from lvctx.training.decoder_shape import DecoderShape

LOGITS_CHUNK = 1024
"""Number of tokens whose logits exist at a time."""

MLP_TILE = 4096
"""Number of tokens whose MLP is computed at a time where MLPs are tiled."""

GIB = 1 << 30


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

    @property
    def alone(self) -> bool:
        """Whether parameters are not sharded: autocast then copies them, and the inputs of matrix products."""
        return self.world == 1 and not self.offload

    def ring(self, key_heads: int) -> int:
        """Members of the ring that passes keys on; 1 where the devices divide attention heads only."""
        heads = {"ring": 1, "ulysses": self.cp, "both": gcd(self.cp, key_heads)}[self.cp_kind]
        return self.cp // heads


def rows_together(seq_len: int, micro_tokens: int, rows: int) -> int:
    """Rows of one forward: as many whole ones as fit, at least one, at most the `rows` of a device's step."""
    return max(1, min(micro_tokens // seq_len, rows))


def memory(shape: DecoderShape, spread: Spread, seq_len: int, *, runtime: int) -> tuple[dict[str, int], int, int]:
    """Bytes of one device by part, its peak, and the bytes of its process on the host.

    Not all parts exist at once: the peak is the largest of four moments: the loss, the backward of the last layer and
    of the first one, and the reduction of the last gradients.
    """
    world, alone, c = spread.world, spread.alone, spread.compute_bytes
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
        # transformers multiplies by experts in the type of their weights, and an embedding is only looked up.
        cast = total - shape.expert_parameters - (0 if shape.tied else shape.vocab * shape.hidden)
        copies, late, last = (0 if spread.lora or c == 4 else 2 * cast), 0, 0
    else:
        copies = c * shape.root + 2 * c * shape.layer
        late = 0 if spread.lora else c * shape.root + (c + 4) * shape.layer
        last = 0 if spread.lora else c * shape.root + (c + 4) * shape.root
    w = 4 if c == 4 or (alone and not spread.lora) else 2
    tokens = -(-seq_len // spread.cp)
    stored, layer, last_layer, moved = _activations(shape, spread, tokens, w)
    host += moved
    loss = _loss(shape, spread, tokens, w)
    shared = tokens * _sharing(shape, spread) if spread.cp > 1 else 0
    parts = {
        **state_bytes,
        "compute_copies": copies + late,
        "activations": stored + layer,
        "loss": loss,
        "all_to_all_buffers" if spread.ring(shape.key_heads) == 1 < spread.cp else "ring_buffers": shared,
        "runtime": runtime,
    }
    always = state_bytes["parameters"] + state_bytes["optimizer"] + runtime
    accumulated = state_bytes["gradients"] if spread.rows > 1 else 0
    # The head's gradient comes with the loss, the others as layers are done, while their inputs are freed.
    done = accumulated or state_bytes["gradients"] * shape.vocab * shape.hidden // total * (not spread.lora)
    copied = (0 if alone else copies) + late  # autocast drops its copies before the backward pass
    peak = always + max(
        accumulated + copies + stored + loss,
        done + copied + stored + layer + shared,
        state_bytes["gradients"] + copied + last_layer + shared,
        state_bytes["gradients"] + last + copied - late,
    )
    return parts, peak, host


def _loss(shape: DecoderShape, spread: Spread, tokens: int, w: int) -> int:
    """Bytes that the loss adds to the activations of the layers."""
    c, chunk = spread.compute_bytes, min(tokens, LOGITS_CHUNK)
    states = (_norm_bytes(shape, spread, w) + w + 2 * c) * shape.hidden * tokens
    if spread.full_logits:
        return states + 12 * shape.vocab * tokens
    logits = (6 if c == 2 else 4) * shape.vocab * chunk
    if spread.lora:
        return states + logits
    if spread.alone and c == 2:
        logits = max(logits, 2 * shape.vocab * (chunk + shape.hidden))
    return states + logits + (4 if spread.alone else c) * shape.vocab * shape.hidden


def _norm_bytes(shape: DecoderShape, spread: Spread, value: int) -> int:
    """Bytes that a norm of values of `value` bytes keeps of each: the input in float32, and what its weight scales."""
    if spread.lora:
        return 4
    return 8 if shape.norms == 4 else 4 + value  # Gemma scales in float32


def _sharing(shape: DecoderShape, spread: Spread) -> int:
    """Bytes per token that context parallelism adds to a layer's backward."""
    reordered = spread.compute_bytes * shape.head_dim * shape.heads * (spread.cp_kind == "both")
    if spread.ring(shape.key_heads) > 1:
        return reordered + shape.head_dim * (24 * shape.key_heads + 8 * shape.heads)
    key_heads = lcm(shape.key_heads, spread.cp)
    return reordered + spread.compute_bytes * shape.head_dim * (3 * shape.heads + 4 * key_heads - 2 * shape.key_heads)


def _activations(shape: DecoderShape, spread: Spread, tokens: int, w: int) -> tuple[int, int, int, int]:
    """Bytes of stored activations, of what a layer's backward adds, of what is left for the first layer, on the host.

    At the end only the first layer's activations are left.
    """
    c, kept, tiled = spread.compute_bytes, spread.recomputation.kept_layers, spread.recomputation.mlp_tiles
    inputs, host = (shape.layers - kept) * w * shape.hidden * tokens, 0
    mlp_saved, mlp_back = shape.mlp_bytes(c, w, frozen=spread.lora > 0)
    casts = spread.alone and c == 2
    projected = 3 if casts else 1
    if not spread.lora:
        projected += 2 if casts and shape.sparse_layers < shape.layers else 1
    inside = (_norm_bytes(shape, spread, w) * shape.norms + c * projected) * shape.hidden + 4 * shape.heads
    inside += c * shape.heads * shape.head_dim * (casts and spread.lora > 0)
    each = 2 * c + _norm_bytes(shape, spread, c) * shape.normed_heads
    inside += each * (shape.heads + shape.key_heads) * shape.head_dim
    inside += 2 * c * shape.hidden * tiled
    inside = (inside + (0 if tiled else mlp_saved)) * tokens
    back = 2 * w * shape.hidden * tokens
    back += (mlp_saved + mlp_back) * min(tokens, MLP_TILE) if tiled else mlp_back * tokens
    if shape.sliding_layers and tokens * spread.cp > shape.window:
        inside += 2 * c * shape.window * tokens * spread.cp
        inside += 2 * c * (shape.heads - shape.key_heads) * shape.head_dim * tokens
    if spread.offload_activations and inputs:
        host, inputs = inputs, 2 * w * shape.hidden * tokens
    stored = inputs + kept * inside
    # When the backward pass reaches the first layer to recompute, the kept layers' activations are free again.
    layer = max(back if kept else 0, inside + back - kept * inside if kept < shape.layers else 0)
    return stored, layer, inside + back + w * shape.hidden * tokens, host


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
    weights = shape.layers * shape.attention + shape.active_mlps + shape.vocab * shape.hidden
    window = min(shape.window, seq_len)
    keys = (shape.layers - shape.sliding_layers) * seq_len / 2
    keys += shape.sliding_layers * (window - window * window / (2 * seq_len))
    attention = 4 * shape.heads * shape.head_dim * keys
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
    for cp in range(spread.cp + 1, spread.world + 1):
        other = replace(spread, cp=cp)
        windowed = shape.sliding_layers and other.ring(shape.key_heads) > 1
        divides = spread.cp_kind != "ulysses" or shape.heads % cp == 0
        if spread.world % cp == 0 and divides and not windowed:
            tried.append((f"--cp {cp}", other))
    if not spread.offload:
        tried.append(("--offload", replace(spread, offload=True)))
    if spread.recomputation.kept_layers < shape.layers and not spread.offload_activations:
        tried.append(("--offload-activations", replace(spread, offload_activations=True)))
    if not spread.lora:
        tried.append(("--lora 16", replace(spread, lora=16)))
    peaks = [(flag, memory(shape, other, seq_len, runtime=device.runtime)[1]) for flag, other in tried]
    unchanged_peak = memory(shape, spread, seq_len, runtime=device.runtime)[1]
    return [(flag, peak) for flag, peak in peaks if peak < unchanged_peak]
