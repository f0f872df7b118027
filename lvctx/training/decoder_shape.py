"""The sizes of a decoder that decide the memory and time of its training, read from config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvctx.errors import InputError

PLANNED_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "mixtral")
"""Model types with layers as in `training.memory_model`."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
}
"""Values of transformers' configuration class that released config.json files leave out."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder with RoPE, grouped-query attention and a gated MLP, or experts that are such MLPs."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether embedding and head share one matrix."""
    attention_bias: int
    """Biases of a layer's attention."""
    mlp_bias: int
    """Biases of a layer's MLP."""
    norms: int
    """Norms of a layer's hidden state."""
    normed_heads: bool
    """Whether queries and keys have norms."""
    sliding_layers: int
    """Layers whose attention has a window; the others attend to all previous tokens."""
    window: int
    """Tokens of a window; 0 without one."""
    sparse_layers: int
    """Layers with experts instead of one MLP."""
    experts: int
    """Experts of such a layer."""
    active: int
    """Experts that compute each token."""
    expert_inner: int
    """Inner width of an expert."""

    @property
    def attention(self) -> int:
        """Weights of a layer's four projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.key_heads)

    @property
    def layer(self) -> int:
        """Parameters of the largest layer."""
        return self._outside_mlp + max(self._dense_mlp if self._dense_layers else 0, self._sparse_mlp)

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        mlps = self._dense_layers * self._dense_mlp + self.sparse_layers * self._sparse_mlp
        return self.layers * self._outside_mlp + mlps + self.root

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return self.sparse_layers * self.experts * self._expert

    @property
    def active_mlps(self) -> int:
        """Weights of MLPs, routers and experts that a token is multiplied by."""
        sparse = self.experts * self.hidden + self.active * self._expert
        return self._dense_layers * 3 * self.hidden * self.inner + self.sparse_layers * sparse

    @property
    def _dense_layers(self) -> int:
        return self.layers - self.sparse_layers

    @property
    def _outside_mlp(self) -> int:
        heads = 2 * self.head_dim if self.normed_heads else 0
        return self.attention + self.attention_bias + heads + self.norms * self.hidden

    @property
    def _dense_mlp(self) -> int:
        return 3 * self.hidden * self.inner + self.mlp_bias

    @property
    def _expert(self) -> int:
        return 3 * self.hidden * self.expert_inner

    @property
    def _sparse_mlp(self) -> int:
        return self.experts * (self.hidden + self._expert) if self.sparse_layers else 0

    def mlp_bytes(self, compute: int, weights: int, *, frozen: bool) -> tuple[int, int]:
        """Bytes per token that an MLP keeps for its backward pass, and more during it: those of the larger kind.

        `compute` and `weights` are the bytes of a value in matrix products and in the hidden state. Frozen weights need
        no inputs, so the product of gate and up, and one copy of the experts' input, are not kept.
        """
        kinds, kept = [], 3 if frozen else 4
        if self._dense_layers:
            kinds.append((kept * compute * self.inner, 3 * compute * self.inner))
        if self.sparse_layers:
            pair = 2 * weights * self.hidden
            states = weights * self.hidden if frozen else pair
            saved = self.active * (kept * weights * self.expert_inner + states + 34) + 4 * self.experts
            kinds.append((saved, self.active * (3 * weights * self.expert_inner + pair)))
        return max(kinds, key=sum)

    def lora(self, rank: int) -> int:
        """Parameters of LoRA on the attention's projections."""
        sides = 4 * self.hidden + 2 * self.head_dim * (self.heads + self.key_heads)
        return self.layers * rank * sides


def read_shape(config: Mapping[str, Any], *, where: object) -> DecoderShape:
    """The shape described by a config.json. Raises InputError for an unsupported model or a missing number."""
    kind = config.get("model_type")
    if kind not in PLANNED_TYPES:
        raise InputError(f"{kind} models are not supported", where=where, fix=f"give one of {', '.join(PLANNED_TYPES)}")
    config = DEFAULTS.get(kind, {}) | {key: value for key, value in config.items() if value is not None}

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None:
            raise InputError(f"config.json lacks {key!r}", where=where)
        if type(value) is not int or value < 1:
            raise InputError(f"{key} is {value!r}", where=where, fix="correct config.json")
        return value

    hidden, inner, heads = (size(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    layers, vocab = size("num_hidden_layers"), size("vocab_size")
    key_heads, dim = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    biased = kind == "qwen2" or bool(config.get("attention_bias"))
    bias = dim * (heads + 2 * key_heads) if biased else 0
    bias += hidden if biased and kind != "qwen2" else 0  # the output projection's
    kinds = _layer_kinds(config, layers, size("sliding_window_pattern", 6) if kind == "gemma3_text" else 0)
    sliding = kinds.count("sliding_attention")
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise InputError(f"mlp_only_layers is {dense!r}", where=where, fix="correct config.json")
    step = size("decoder_sparse_step", 1)
    has_experts = kind in ("qwen3_moe", "mixtral")
    sparse = sum((i + 1) % step == 0 and i not in dense for i in range(layers)) if has_experts else 0
    experts = size("num_experts" if "num_experts" in config else "num_local_experts") if sparse else 0
    return DecoderShape(
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head_dim=dim,
        vocab=vocab,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        mlp_bias=2 * inner + hidden if config.get("mlp_bias") else 0,
        norms=4 if kind == "gemma3_text" else 2,
        normed_heads=kind in ("qwen3", "gemma3_text", "qwen3_moe"),
        sliding_layers=sliding,
        window=size("sliding_window") if sliding else 0,
        sparse_layers=sparse,
        experts=experts,
        active=min(size("num_experts_per_tok"), experts) if sparse else 0,
        expert_inner=size("moe_intermediate_size", inner) if sparse else 0,
    )


def _layer_kinds(config: Mapping[str, Any], layers: int, pattern: int) -> list[str]:
    """The attention of each layer; without `layer_types` every `pattern`-th is full, the others have a window."""
    stored = config.get("layer_types")
    if isinstance(stored, list) and len(stored) == layers:
        return stored
    return ["sliding_attention" if pattern and (i + 1) % pattern else "full_attention" for i in range(layers)]
