"""Names and meanings of every artifact and row this project writes. `NAME/N`: N grows when a reader would break."""

PACKED = "lvctx.packed/1"
"""Directory: `shard-*.safetensors` with input_ids int32 (rows, seq_len), doc_starts ragged; MANIFEST.json."""

CHAT = "lvctx.chat/1"
"""Directory: `shard-*.safetensors` with ids and labels of whole chat samples, `shard-*.jsonl` with what each sample and
its images and videos are, `left-out.jsonl`; MANIFEST.json."""

MODEL = "lvctx.model/1"
"""Directory: a Hugging Face model with MANIFEST.json and, after training, metrics.jsonl."""

BASE = "lvctx.base/1"
"""Row: how far a RoPE base finds needles, of `extend-lm --search-base`."""

FRAMES = "lvctx.frames/1"
"""Safetensors: features bf16 (F, P, D) before the projector, pts f64 (F,) seconds, index i64 (F,) source frames."""

FRAMES_HYBRID = "lvctx.frames/2"
"""The same with grid i64 (F, 2): rows and columns of tokens of each frame once it is pooled, where these differ."""

HAYSTACK = "lvctx.haystack/1"
"""Directory: a haystack's frames as 000000.png and on, and MANIFEST.json; hashes of the pixels beside it."""

NIAH = "lvctx.niah/1"
"""Directory: results.jsonl (one row a cell), summary.json, heatmap.json, heatmap.png."""

ANSWER = "lvctx.answer/1"
"""Row: one answer of `vqa`."""

QUESTIONS = "lvctx.questions/1"
"""Directory: results.jsonl (one row a question of a benchmark), and what the benchmark's own scorer reads."""

SCORE = "lvctx.score/1"
"""Row: the score of one run or responses file, or the difference of two."""
