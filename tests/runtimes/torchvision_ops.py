"""In the site-packages of an environment: PyPI's torchvision, made for CUDA, imports beside a CPU build of torch."""

import importlib.abc
import sys
from typing import Any


class _Define(importlib.abc.MetaPathFinder):
    """Defines the operators that torchvision expects its own kernels to have defined, before it is first imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is not None:  # then its kernels load
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torch"].torchvision_library = library  # the definitions live as long as this object


sys.meta_path.insert(0, _Define())
