"""Models and commands as a table in Markdown: the README's."""

from lvctx.vlm.registry import FAMILIES, GENERIC, TRAINED, support_of

LANGUAGE_MODEL = "language model"
EXAMPLE_FORWARD = "gemma3"
"""A model type of no family."""
NOTES = {
    ("extend-lm", LANGUAGE_MODEL): "theta, PI, NTK, YaRN, PoSE",
    ("extend-lm", "llava_onevision"): "its language model",
    ("align", LANGUAGE_MODEL): "in",
    ("align", "llava_onevision"): "out; `--init`",
    ("mrope-extend", "qwen2_vl"): "M-RoPE++, PI, NTK, YaRN; trains",
    ("mrope-extend", "qwen3_vl"): "PI, NTK, YaRN; does not train yet",
    ("export", LANGUAGE_MODEL): "hf",
    ("export", "llava_onevision"): "hf, llava (CLIP towers)",
    ("export", "qwen2_vl"): "hf",
    ("export", "qwen3_vl"): "hf",
}
"""What a command does with a model, where yes is not enough."""
COMMAND_ROWS = (
    ("extend-lm",),
    ("align",),
    ("mrope-extend",),
    ("niah text",),
    ("niah video", "vqa", "videomme", "bench"),
    ("encode-video",),
    ("export",),
)
"""Commands that take the same models."""


def model_table() -> str:
    """One column for each way a model is served, one row for each command."""
    qwen3 = [kind for kind, target in FAMILIES.items() if target.endswith(":Qwen3VL")]
    columns = {
        LANGUAGE_MODEL: LANGUAGE_MODEL,
        "llava_onevision": "llava_onevision (`align`, `import-longva`)",
        "qwen2_vl": ", ".join(kind for kind in TRAINED if kind not in qwen3),
        "qwen3_vl": ", ".join(qwen3),
        GENERIC[0]: ", ".join(GENERIC),
        EXAMPLE_FORWARD: "any other class of images and text in transformers",
    }
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for commands in COMMAND_ROWS:
        cells = [_cell(commands[0], kind) for kind in columns]
        lines.append("| " + ", ".join(f"`{name}`" for name in commands) + " | " + " | ".join(cells) + " |")
    reuse = [support.reuse if (support := support_of(kind)) else "prefixes" for kind in columns]
    words = {"prefixes": "computed once", "none": "computed again"}
    lines.append("| what prompts share | " + " | ".join(words[one] for one in reuse) + " |")
    return "\n".join(lines)


def _cell(command: str, kind: str) -> str:
    support = support_of(kind)
    takes = command in (support.commands if support else ("extend-lm", "align", "niah text", "export"))
    return NOTES.get((command, kind), "yes") if takes else "–"
