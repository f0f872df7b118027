"""Host memory of each rank of a training on gloo processes, and of `export`, against its shard and the largest tensor.

    python benchmarks/sharded_memory.py [--command extend-lm] [--ranks 2] [--lora 8] [--layers 13] [--hidden 1536]
        [--resumed] [--rounds 3] [--nano .cache/nano]

The models are random, in bfloat16, with the nano model's tokenizer. Trainings do one step of one short row a rank:

    extend-lm                 a Llama on rows of 64 tokens
    extend-positions          the Llama, `extend-lm --steps 0`, in one process
    align-new                 `align --lm --tower --stage full`: the Llama, a small CLIP tower, images of one grid
    align-init                `align --init --stage full`: the VLM of this Llama and tower
    mrope-extend              a Qwen2-VL with a small tower on packed chat
    export-hf, export-llava   the VLM of align-init, in one process

What is trained is a LoRA of rank `--lora`, or with `--lora 0` all parameters of the language model. In bytes, one JSON
line of medians over the rounds:

    torch      peaks of the same run with a model of one narrow layer: libraries, process group, tokenizer
    loading    peak of each rank before the steps, less that of `torch`
    training   from the optimizer's creation to the last checkpoint, activations and gathered layers included; with
               --resumed, while the last checkpoint is read
    saving     after the steps
    shard      parameters that a rank holds (trained ones are float32); 0 where nothing is trained
    state      the shard with gradients and AdamW's moments
    largest    the largest parameter
    limit      1.3 x (shard + largest)
    ratio      the largest of `loading` and `saving` over `limit`
    training_ratio   the largest of `training` over 1.3 x (state + largest)

 Linux only. With PYTHONPATH at another version of lvctx the figures are that version's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

LENGTH = 64
EXPORTS = ("export-hf", "export-llava")
TRAININGS = ("extend-lm", "align-new", "align-init", "mrope-extend")
PHASES = ("loading", "training", "saving")


def task_of(command: str, here: Path, size: str, out: Path, lora: int) -> Any:
    """The training of a command, on the model of a size ("small" or "large")."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    model = here / size
    if command.startswith("extend"):
        from lvctx.training.extend import resolve_extend
        from lvctx.training.extend_config import ExtendConfig

        rows: dict[str, Any] = {"data": here / "rows", "steps": 1, "batch_tokens": LENGTH * ranks, "lora": lora}
        if command == "extend-positions":
            rows = {"steps": 0}
        rope: dict[str, Any] = {"rope_theta": 1e6, "context": 4096}
        return resolve_extend(ExtendConfig(model=str(model), out=out, **rows, **rope)).task()
    if command == "mrope-extend":
        from lvctx.training.mrope_config import MropeConfig
        from lvctx.training.mrope_extend import resolve_mrope_training

        chat: dict[str, Any] = {"data": here / "chat", "media": here, "steps": 1, "batch": ranks}
        return resolve_mrope_training(MropeConfig(model=str(model), out=out, scale=2, lora=lora, **chat)).task()
    from lvctx.training.align_config import AlignConfig
    from lvctx.training.align_job import resolve_align
    from lvctx.training.dpo import align_task

    parts = {"init": str(here / f"{size}-vlm")}
    if command == "align-new":
        parts = {"lm": str(model), "tower": str(here / "tower")}
    images: dict[str, Any] = {"data": here / "chat.json", "images": here, "steps": 1, "batch": ranks}
    return align_task(resolve_align(AlignConfig(stage="full", out=out, lora=lora, tower_lr=0.0, **images, **parts)))


def rank(command: str, here: str, size: str, out: str, lora: str, stop: str) -> None:
    """One process of torchrun: the training, then its bytes and its peaks to a file; with `stop` only its steps."""
    from lvctx.training import run_training
    from lvctx.training.parallel_config import ParallelConfig, RunControl

    found: dict[str, Any] = {}
    train, gathering = run_training.train, run_training.gathering

    def training(*arguments: Any) -> Any:
        found["loading"] = restart_peak()
        return train(*arguments)

    def saving(model: Any, world: Any) -> Any:
        if stop:
            world.barrier()
            os._exit(0)
        found["training" if "loading" in found else "loading"] = restart_peak()
        held = {"shard": 0, "state": 0, "largest": 0}
        for p in model.parameters():
            local = p.to_local().nbytes if "training" in found else 0
            held["shard"] += local
            held["state"] += 4 * local if p.requires_grad else local
            held["largest"] = max(held["largest"], p.numel() * p.element_size())
        found.update(held)
        return gathering(model, world)

    run_training.train, run_training.gathering = training, saving  # type: ignore[assignment]
    task = task_of(command, Path(here), size, Path(out), int(lora))
    parallel = ParallelConfig(device="cpu", micro_tokens=LENGTH if command.startswith("align") else None)
    run_training.run_training(task, parallel, RunControl(out=Path(out)))
    found["saving"] = restart_peak()
    Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps(found))


def export(command: str, here: str, size: str, out: str, *_: str) -> None:
    """An export in this process, then its bytes and its peak to a file."""
    import torch  # noqa: F401 - what the limit does not count is the same as in a training

    from lvctx.artifacts.weights import read_weights
    from lvctx.models.convert_config import ExportConfig
    from lvctx.models.export import plan_export, run_export

    source = Path(here, f"{size}-vlm")
    job = plan_export(ExportConfig(model=str(source), to=command.removeprefix("export-"), out=Path(out)))  # type: ignore[arg-type]
    run_export(job, resume="auto", force=False, on_progress=lambda *_: None)
    largest = max(weight.size for shard in read_weights(source).values() for weight in shard.values())
    Path(f"{out}.0").write_text(json.dumps({"shard": 0, "largest": largest, "saving": restart_peak()}))


def restart_peak() -> int:
    """Most memory of this process in bytes since the last call."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024


def make_model(command: str, here: Path, size: str, nano: Path, *, layers: int, hidden: int) -> int:
    """Random weights of what the command reads; returns the bytes of all tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano / "lm")
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(0)
    if command == "mrope-extend":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.all_special_tokens, *marks]})
        names = ("vision_start", "vision_end", "image", "video")
        ids = {f"{name}_token_id": i for name, i in zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)}
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        text |= {"vocab_size": len(tokenizer), "rope_parameters": rope}
        tower = {"depth": 2, "num_heads": 2, "patch_size": 14, "embed_dim": 32, "hidden_size": hidden}
        config = AutoConfig.for_model(
            "qwen2_vl", text_config=text, vision_config=tower, tie_word_embeddings=False, **ids
        )
        model = AutoModelForImageTextToText.from_config(config).bfloat16()
        Qwen2VLImageProcessorPil(patch_size=14).save_pretrained(here / size)
    else:
        # An untied head, as in models of 7B; `align` adds two tokens.
        config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False, **text)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(here / size)
    tokenizer.save_pretrained(here / size)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if command.startswith(("align", "export")):
        make_tower(here / "tower")
    if command in ("align-init", *EXPORTS):
        from transformers import CLIPVisionModel

        from lvctx.models.vlm_assembly import assemble, save_vlm

        tower = CLIPVisionModel.from_pretrained(here / "tower").bfloat16()
        save_vlm(assemble(model, tower, tokenizer, where=here, seed=0), tokenizer, here / "tower", here / f"{size}-vlm")
    return total


def make_tower(out: Path) -> None:
    """A random CLIP tower of 48 pixels."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=12)).bfloat16().save_pretrained(out)
    square = {"height": 48, "width": 48}
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=square).save_pretrained(out)


def make_data(command: str, here: Path, nano: Path, ranks: int) -> None:
    """What the command trains on: at least a row for every rank."""
    if command.startswith("extend"):
        flags = ["--tokenizer", here / "small", "--seq-len", LENGTH, "--keep-short", 1, "-o", here / "rows"]
        lvctx("pack-text", nano / "essays" / "love.txt", "--separator", "<|endoftext|>", *flags)
        return
    Image.new("RGB", (56, 56), "red").save(here / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": "a.png", "conversations": turns} for _ in range(8 * ranks)]
    (here / "chat.json").write_text(json.dumps(rows))
    if command == "mrope-extend":
        flags = ["--media", here, "--long-share", "any", "--target-length", LENGTH, "-o", here / "chat"]
        lvctx("pack-chat", "--model", here / "small", "--interleaved", here / "chat.json", *flags)


def lvctx(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "lvctx", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def measure(command: str, here: Path, size: str, ranks: int, lora: int, resumed: bool) -> list[dict[str, int]]:
    """Bytes and peaks of every rank of one run."""
    processes = ranks if command in TRAININGS else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    out = here / "out"
    arguments = [*(launcher if processes > 1 else []), __file__, "--worker", command, here, size, out, lora]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stop in ("stop", "") if resumed else ("",):
        started = [sys.executable, *map(str, arguments), stop]
        subprocess.run(started, check=True, env=environment, stdout=subprocess.DEVNULL)
    shutil.rmtree(out)
    return [json.loads(Path(f"{out}.{number}").read_text()) for number in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=(*TRAININGS, "extend-positions", *EXPORTS), default="extend-lm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lora", type=int, default=8)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nano", type=Path, default=Path(".cache/nano"))
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        (export if arguments.worker[0] in EXPORTS else rank)(*arguments.worker)
        return
    command, nano, ranks, lora = arguments.command, arguments.nano, arguments.ranks, arguments.lora
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        make_model(command, here, "small", nano, layers=1, hidden=64)
        large = {"layers": arguments.layers, "hidden": arguments.hidden}
        weights = make_model(command, here, "large", nano, **large)
        make_data(command, here, nano, ranks)
        runs: dict[str, list[list[dict[str, int]]]] = {"small": [], "large": []}
        for _ in range(arguments.rounds):
            for size, found in runs.items():
                found.append(measure(command, here, size, ranks, lora, arguments.resumed))
    figures = summary(runs["small"], runs["large"])
    print(json.dumps({"command": command, "ranks": ranks, "lora": lora, "weights": weights, **figures}))


def summary(small: list[list[dict[str, int]]], large: list[list[dict[str, int]]]) -> dict[str, Any]:
    """Medians over the rounds, and how they compare with the limits."""

    def medians(runs: list[list[dict[str, int]]], key: str) -> list[int]:
        return [round(statistics.median(run[i][key] for run in runs)) for i in range(len(runs[0]))]

    alone = {phase: medians(small, phase) for phase in PHASES if phase in small[0][0]}
    above = {p: [a - b for a, b in zip(medians(large, p), alone[p], strict=True)] for p in alone}
    figures: dict[str, Any] = {key: max(medians(large, key)) for key in ("shard", "largest")}
    limit = 1.3 * (figures["shard"] + figures["largest"])
    figures |= {"limit": round(limit), "torch": {phase: max(values) for phase, values in alone.items()}, **above}
    figures["ratio"] = round(max(max(above[phase]) for phase in above if phase != "training") / limit, 3)
    if "training" in above:
        figures["state"] = max(medians(large, "state"))
        limit = 1.3 * (figures["state"] + figures["largest"])
        figures["training_ratio"] = round(max(above["training"]) / limit, 3)
    return figures


if __name__ == "__main__":
    main()
