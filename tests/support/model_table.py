"""Models and commands as a table in Markdown, from the registry: the README's.

To print it: PYTHONPATH=tests python -c 'from support.model_table import model_table; print(model_table())'.
"""

from lvctx.vlm.registry import EVALUATE, FAMILIES, FORWARD, ModelSupport, support_of

LANGUAGE_MODEL = ModelSupport(
    family="language model", reuse="prefixes", commands=("extend-lm", "align", "niah text", "perplexity", "export")
)
ANY_OTHER = "any other class of images and text in transformers"
MADE_BY = {"LlavaOnevision": " (`align`, `import-longva`)"}
"""Commands that write models of a family."""
NOTES = {
    ("extend-lm", "language model"): "theta, PI, NTK, YaRN, PoSE",
    ("extend-lm", "LlavaOnevision"): "its language model",
    ("extend-lm", "QwenVL"): "its language model; also M-RoPE++",
    ("extend-lm", "Qwen3VL"): "its language model (not MoE)",
    ("align", "language model"): "in",
    ("align", "LlavaOnevision"): "out; `--init`, also on packed chat",
    ("mrope-extend", "QwenVL"): "M-RoPE++, PI, NTK, YaRN; trains",
    ("mrope-extend", "Qwen3VL"): "PI, NTK, YaRN; trains (not MoE)",
    ("export", "language model"): "hf",
    ("export", "LlavaOnevision"): "hf, llava (CLIP towers)",
    ("export", "QwenVL"): "hf",
    ("export", "Qwen3VL"): "hf",
}
"""What a command does with a family, where yes is not enough."""
COMMAND_ROWS = (
    ("extend-lm",),
    ("align",),
    ("mrope-extend",),
    ("niah text", "perplexity"),
    EVALUATE,
    ("encode-video",),
    ("export",),
)
"""Commands that take the same models."""
REUSE = {"prefixes": "computed once", "none": "computed again"}


def model_table() -> str:
    """One column for each way a model is served, one row for each command."""
    columns = {"language model": LANGUAGE_MODEL, **_families()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for commands in COMMAND_ROWS:
        cells = [_cell(commands[0], support) for support in columns.values()]
        lines.append("| " + ", ".join(f"`{name}`" for name in commands) + " | " + " | ".join(cells) + " |")
    reuse = [REUSE[support.reuse] for support in columns.values()]
    return "\n".join([*lines, "| what prompts share | " + " | ".join(reuse) + " |"])


def _families() -> dict[str, ModelSupport]:
    """Heading and support of each family, by the first of its model types."""
    kinds: dict[str, list[str]] = {}
    for kind, target in FAMILIES.items():
        kinds.setdefault(target.partition(":")[2], []).append(kind)
    columns = {}
    for family, members in kinds.items():
        support = support_of(members[0])
        assert support is not None
        columns[", ".join(members) + MADE_BY.get(family, "")] = support
    others = ModelSupport(family=FORWARD.partition(":")[2], reuse="none", commands=EVALUATE)
    return {**columns, ANY_OTHER: others}


def _cell(command: str, support: ModelSupport) -> str:
    return NOTES.get((command, support.family), "yes") if command in support.commands else "–"
