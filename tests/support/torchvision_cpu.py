"""PyPI's torchvision beside a CPU build of torch, for the video processors of stock transformers.

Its wheels are made for CUDA, so their own kernels do not load beside `torch==X+cpu` and importing them fails;
nothing in a video processor uses those kernels. Where torchvision imports as it is, it is taken as it is.
"""

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "torchvision"


def install() -> Path | None:
    """A folder with the torchvision of this torch, from PyPI; None where none can be had."""
    import torch

    minor = int(torch.__version__.split(".")[1])
    folder = CACHE / f"0.{minor + 15}"  # torch 2.13 and torchvision 0.28 belong together
    if not (folder / "torchvision").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        command += ["--target", str(folder), f"torchvision=={folder.name}.*"]
        if subprocess.run(command, capture_output=True).returncode:
            return None
    return folder


def use(folder: Path | None = None) -> None:
    """Make `import torchvision` work here: that in `folder`, or in the folder of the variable TORCHVISION."""
    import torch

    try:
        import torchvision
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.path.append(str(folder or os.environ["TORCHVISION"]))
        import torchvision

        torchvision.library = library  # the definitions live as long as the object that made them
