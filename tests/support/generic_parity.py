"""Our prompts, logits and replies beside stock transformers' for tiny models of many classes, in a process of its own.

    python generic_parity.py FOLDER VIDEO QUESTIONS KIND...

Stock video processors need torchvision, which the suite does without. Writes FOLDER/KIND, a checkpoint, and prints one
JSON line for each class and kind of media, and for each command on the classes `COMMANDED`.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
QUESTION = "What is it? the\n\nWo"
ANSWER = "Blue"
NO_MIXTURE = ("smolvlm", "glm4v")
"""Classes whose stock code takes no image beside a video."""
PREFIX = ("paligemma",)
"""Classes whose whole prompt attends in both directions: an answer is not part of it (token type 1)."""
AS_IMAGES = ("glm4v",)
"""Classes that end a video with a time, so that frames of a haystack are images."""
COMMANDED = ("internvl", "gemma3")
"""Classes that the commands are run on."""
SAMPLED = ("--temperature", "1.5", "--seed", "3")
"""Options of a reply that is not greedy."""


def packages() -> list[str]:
    """Folders with what stock processors need beside transformers; none where it cannot be had."""
    from support import torchvision_cpu

    torchvision, words = torchvision_cpu.install(), ROOT / ".cache" / "num2words"
    if not words.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--target", str(words), "num2words"], capture_output=True)
    return [str(torchvision), str(words)] if torchvision and words.is_dir() else []


def drawn(count: int, *, shapes: Sequence[tuple[int, int]] = ((40, 64),)) -> list[Any]:
    """Random images of these heights and widths in turn."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(count)
    sizes = [shapes[i % len(shapes)] for i in range(count)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def compare(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows with the largest differences from stock."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lvctx.inference.engine_config import EngineConfig
    from lvctx.inference.open_engine import open_engine
    from lvctx.vlm.registry import open_vlm
    from lvctx.vlm.stock_prompt import Clip
    from support import generic_models

    if kind in generic_models.STOCK_IMAGES:
        yield from compare_images(kind, folder)
        return
    path = generic_models.save(kind, folder / kind)
    vlm: Any = open_vlm(path)
    engine: Any = open_engine(vlm, EngineConfig(device="cpu", dtype="float32", prefill_chunk=20))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    shown: dict[str, list[Any]] = {"image": drawn(1), "images": drawn(3, shapes=((40, 64), (70, 40), (33, 33)))}
    if vlm.processor.takes_video:
        clip = Clip(frames=drawn(6), times=[float(i) for i in range(6)])
        shown["video"] = [clip]
        if kind not in NO_MIXTURE:
            shown["mixed"] = [*drawn(1), clip, *drawn(1)]
    for name, media in shown.items():
        inputs = stock_inputs(processor, media, QUESTION)
        show(engine, media)
        yield {"kind": kind, "shown": name, **differences(engine, model, inputs, vlm.processor.is_placeholder)}
    yield {"kind": kind, "shown": "haystack", **in_haystack(vlm, model, processor, folder / "frames")}


def compare_images(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The same for images alone: one, one that is cut into more grids than are kept, and several."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lvctx.inference.engine_config import EngineConfig
    from lvctx.inference.open_engine import open_engine
    from lvctx.video.sampling import VideoSampling
    from lvctx.vlm.registry import open_vlm
    from lvctx.vlm.stock_processor import StockProcessor
    from support import generic_models

    path = generic_models.save(kind, folder / kind)
    vlm: Any = open_vlm(path)
    engine: Any = open_engine(vlm, EngineConfig(device="cpu", dtype="float32", prefill_chunk=20))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    images = {
        "image": drawn(1),
        "large": drawn(1, shapes=((120, 128),)),
        "images": drawn(2, shapes=((40, 64), (70, 40))),
    }
    for name, media in images.items():
        engine.show(media, VideoSampling())
        inputs = stock_inputs(processor, media, QUESTION)
        placeholder = StockProcessor(path).is_placeholder
        yield {"kind": kind, "shown": name, **differences(engine, model, inputs, placeholder)}


def show(engine: Any, media: Sequence[Any]) -> None:
    """What `show` does after a file was read."""
    if engine.vlm.shares_prefixes:
        engine.set_visual_input(engine.vlm.visual_input(media))
    else:
        engine.media = media


def stock_inputs(processor: Any, media: Sequence[Any], question: str, answer: str = "") -> Any:
    """A prompt about images or videos as stock code makes it."""
    import numpy as np

    clips = [one for one in media if hasattr(one, "times")]
    parts = [{"type": "video" if hasattr(one, "times") else "image"} for one in media]
    content = [*parts, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    arguments: dict[str, Any] = {"images": [one for one in media if not hasattr(one, "times")] or None}
    if clips:
        frames = len(clips[0].frames)
        metadata = {"total_num_frames": frames, "fps": 1.0, "duration": frames, "frames_indices": list(range(frames))}
        arguments["videos"] = [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips]
        arguments |= {"video_metadata": [metadata], "do_sample_frames": False}
    return processor(text=[text + answer], return_tensors="pt", **arguments)


def differences(engine: Any, model: Any, inputs: Any, is_placeholder: Callable[[Any], Any]) -> dict[str, Any]:
    """Ids, the log-probability of every token of an answer, and greedy tokens."""
    import numpy as np
    import torch

    stock_ids = inputs["input_ids"][0].numpy()
    engine.prompt_ids(["Another?"])
    ids = engine.prompt_ids([QUESTION])
    placeholders = is_placeholder(stock_ids)
    same_ids = len(ids) == len(stock_ids) and bool(np.array_equal(ids[~placeholders], stock_ids[~placeholders]))
    with torch.no_grad():
        stock = model(**inputs).logits[0, -1].log_softmax(-1)
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(stock_ids) :].tolist()
    answers = {engine.tokenizer.encode(letter, add_special_tokens=False)[0]: letter for letter in "ABCxyz"}
    scores = {token: engine.score([QUESTION], letter).log_prob for token, letter in answers.items()}
    error = max(abs(score - float(stock[token])) for token, score in scores.items())
    return {
        "same_ids": same_ids,
        "error": error,
        "same_reply": [t for t in generated if t not in engine.stop_ids]
        == engine.finish([engine.start(engine.prompt_ids([QUESTION]), 6)])[0],
        "placeholders": int(placeholders.sum()),
    }


def in_haystack(vlm: Any, model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """A needle among frames, before and behind others: prompt and answer against stock on the same frames."""
    import numpy as np
    import torch

    from lvctx.inference.open_engine import open_scorer
    from lvctx.video.sampling import VideoSampling
    from lvctx.vlm.stock_prompt import Clip

    folder.mkdir(exist_ok=True)
    frames = drawn(9)
    for i, frame in enumerate(frames[:8]):
        frame.save(folder / f"{i}.png")
    haystack = vlm.haystack([folder], VideoSampling(), as_images=vlm.path.name in AS_IMAGES)
    tokens = haystack.tokens(8, frames[8:])
    scorer = open_scorer(model, tokens, chunk=13, reuse=True, kv_cache="device", meter=vlm.meter)
    unit, error, same, ran, total = tokens.frames_per_grid, 0.0, True, 0, 0
    for length, place in ((8, 4), (8, 6), (4, 4), (4, 0)):
        order = np.concatenate([np.arange(place), np.repeat(8, unit), np.arange(place, length)])
        prompt, answer = tokens.tail([QUESTION], ANSWER)
        ids = np.concatenate([tokens.ids(order), prompt, answer]).astype(np.int64)
        ran, total = ran - scorer.tokens_run, total + len(ids)
        score = scorer.score(ids, len(answer), generate=3)
        ran += scorer.tokens_run
        chosen = [frames[i] for i in order]
        media = chosen if haystack.as_images else [Clip(frames=chosen, times=[float(i) for i in range(len(order))])]
        inputs = stock_inputs(processor, media, QUESTION, "" if vlm.path.name in PREFIX else ANSWER)
        if vlm.path.name in PREFIX:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            more = {"input_ids": torch.tensor([answer])}
            one = torch.ones(1, len(answer), dtype=torch.long)
            texts = ("input_ids", "attention_mask", "token_type_ids")
            inputs |= {name: torch.cat([inputs[name], more.get(name, one)], dim=1) for name in texts}
        text = ids < vlm.vocabulary
        same &= np.array_equal(inputs["input_ids"][0].numpy()[text], ids[text]) and len(ids) == len(
            inputs["input_ids"][0]
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        stock = float(logits[torch.arange(len(answer)), answer].sum())
        error = max(error, abs(score.log_prob - stock))
        same &= score.generated is not None and score.generated[0] == int(logits[0].argmax())
    again = tokens.ids(np.array([0] * unit + [8] * unit + [0] * unit + [8] * unit))
    visual = again[again >= vlm.vocabulary][: 4 * tokens.per_grid].reshape(4, -1)
    equal = bool((visual[1] == visual[3]).all()) and bool((visual[0] != visual[1]).all())
    return {"same_ids": same, "error": error, "same_reply": equal, "shared": ran < total, "placeholders": 1}


def commands(path: Path, clip: Path, questions: Path, out: Path) -> Iterator[dict[str, Any]]:
    """The three commands on a checkpoint: exit code, last line of stderr, rows."""
    from typer.testing import CliRunner

    from lvctx.cli.app import app

    videos = out / "videos"
    videos.mkdir(parents=True)
    (videos / clip.name).symlink_to(clip)
    small = ["--lengths", "2,4", "--depths", "0,1", "--trials", "2"]
    for arguments in (
        ["vqa", str(clip), "--frames", "4", "--ask", "What?", "--ask", "Why <image>?", "--max-new-tokens", "3"],
        ["niah", "video", "--haystack", str(clip), *small, "-o", str(out / "niah")],
        ["videomme", "run", "--videos", str(videos), "--questions", str(questions), "--frames", "2"],
        ["vqa", str(clip), "--frames", "2", *["--ask", "What?"] * 2, "--max-new-tokens", "8", *SAMPLED],
    ):
        target = ["-o", str(out / "videomme")] if arguments[0] == "videomme" else []
        done = CliRunner().invoke(app, [*arguments, "--model", str(path), *target], catch_exceptions=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        yield {"command": arguments[0], "exit": done.exit_code, "stderr": done.stderr[-500:], "rows": rows}


def main() -> None:
    """All classes named."""
    import torch
    import torchvision_cpu

    folder, clip, questions, kinds = *map(Path, sys.argv[1:4]), sys.argv[4:]
    folders = packages()
    sys.path += folders[1:]
    torchvision_cpu.use(Path(folders[0]))
    importlib.invalidate_caches()
    torch.set_num_threads(1)
    for kind in kinds:
        try:
            for row in compare(kind, folder):
                print(json.dumps(row), flush=True)
            if kind in COMMANDED:
                for row in commands(folder / kind, clip, questions, folder / f"{kind}-runs"):
                    print(json.dumps({"kind": kind, **row}), flush=True)
        except Exception as e:
            print(json.dumps({"kind": kind, "shown": "failed", "failed": f"{type(e).__name__}: {e}"}), flush=True)
            if len(kinds) == 1:
                raise


if __name__ == "__main__":
    main()
