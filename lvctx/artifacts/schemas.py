"""Names and meanings of all artifacts and rows this project writes. `NAME/N`: N grows with incompatible changes."""

PACKED = "lvctx.packed/1"
"""Directory: `shard-*.safetensors` with input_ids int32 (rows, seq_len), doc_starts ragged; MANIFEST.json."""

CHAT = "lvctx.chat/1"
"""Directory: `shard-*.safetensors` with ids and labels of whole chat samples, `shard-*.jsonl` with the origin of each
sample and of its images and videos, `left-out.jsonl`; MANIFEST.json."""

MODEL = "lvctx.model/1"
"""Directory: a Hugging Face model with MANIFEST.json and, after training, metrics.jsonl."""

BASE = "lvctx.base/1"
"""Row: the context length at which a RoPE base still finds needles, of `extend-lm --search-base`."""

FRAMES = "lvctx.frames/1"
"""Safetensors: features bf16 (F, P, D) before the projector, pts f64 (F,) seconds, index i64 (F,) source frames."""

FRAMES_HYBRID = "lvctx.frames/2"
"""The same with grid i64 (F, 2): rows and columns of each frame's tokens after pooling, where these differ."""

HAYSTACK = "lvctx.haystack/1"
"""Directory: a haystack's frames as 000000.png, 000001.png, ..., and MANIFEST.json, which has hashes of the pixels."""

NIAH = "lvctx.niah/1"
"""Directory: results.jsonl (one row per cell), summary.json, heatmap.json, heatmap.png."""

PERPLEXITY = "lvctx.perplexity/1"
"""Row: a model's perplexity on packed rows, by position."""

ANSWER = "lvctx.answer/1"
"""Row: one answer of `vqa`."""

QUESTIONS = "lvctx.questions/1"
"""Directory: results.jsonl (one row per question of a benchmark), and files for the benchmark's own scorer."""

SHARD = "lvctx.shard/1"
"""File shard.json: which shard of a benchmark's run a directory has, and the questions of the whole run."""

MERGED = "lvctx.merged/1"
"""Row: what `bench merge` wrote, and the ids of questions that are missing."""

PROTOCOL = "lvctx.protocol/1"
"""Row: what a packaged evaluation protocol states for one benchmark."""

BENCHMARK = "lvctx.benchmark/1"
"""Row: a benchmark of `bench list`."""

SCORE = "lvctx.score/1"
"""Row: the score of one run or responses file, or the difference of two."""

REPORT = "lvctx.report/1"
"""Row: the HTML page that `report` wrote."""
