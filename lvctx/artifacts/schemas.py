"""Names and meanings of every artifact and row this project writes. `NAME/N`: N grows when a reader would break."""

PACKED = "lvctx.packed/1"
"""Directory: `shard-*.safetensors` with input_ids int32 (rows, seq_len), doc_starts ragged; MANIFEST.json."""

MODEL = "lvctx.model/1"
"""Directory: a Hugging Face model with MANIFEST.json and, after training, metrics.jsonl."""

FRAMES = "lvctx.frames/1"
"""Safetensors: features bf16 (F, P, D) before the projector, pts f64 (F,) seconds, index i64 (F,) source frames."""

HAYSTACK = "lvctx.haystack/1"
"""Directory: a haystack's frames as 000000.png and on, and MANIFEST.json; hashes of the pixels beside it."""

NIAH = "lvctx.niah/1"
"""Directory: results.jsonl (one row a cell), summary.json, heatmap.json, heatmap.png."""

ANSWER = "lvctx.answer/1"
"""Row: one answer of `vqa`."""
