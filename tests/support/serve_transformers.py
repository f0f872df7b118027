"""`transformers serve` with the torchvision of `torchvision_cpu`: same arguments.

The server decodes images by torchvision's own kernels, which do not load beside a CPU build of torch: Pillow decodes
them in their place.
"""

import io
import sys
from typing import Any

from support import torchvision_cpu


def decode_image(data: Any, *args: Any, **kwargs: Any) -> Any:
    """Bytes of an image file, uint8, as uint8 (3, H, W)."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(io.BytesIO(data.numpy().tobytes())) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


if __name__ == "__main__":
    torchvision_cpu.use(torchvision_cpu.install())
    import torchvision.io
    from transformers.cli.transformers import main

    torchvision.io.decode_image = decode_image
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    main()
