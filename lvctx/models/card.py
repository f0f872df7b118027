"""The model card, README.md of a model directory: sections are identified by their heading."""

from pathlib import Path
from typing import Any

from lvctx.artifacts.store import atomic_file, read_json

CARD = "README.md"
VISION, POSITIONS = "Images and video", "Positions"
TILES = """\
Stock code encodes an image given as `image` in LLaVA-NeXT's AnyRes: a base image and tiles, not pooled. This model was
aligned with {aligned}, so it answers better when an image is given as a video of its tiles (for the model of
lvctx's `make demo`, 55 of 60 answers are right that way and 42 as `image`):

```python
import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{imports}

processor = AutoProcessor.from_pretrained(model_dir)
model = AutoModelForImageTextToText.from_pretrained(model_dir)
image = Image.open(image_file).convert("RGB")
tiles = {tiles}
content = [{{"type": "video"}}, {{"type": "text", "text": question}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=prompt, videos=[np.stack(tiles)], do_sample_frames=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```
"""


def read_section(text: str, heading: str) -> tuple[str, str]:
    """The section of a card with this heading, empty if there is none, and the rest of the card."""
    before, _, after = text.partition(f"## {heading}\n")
    body, _, rest = after.partition("\n## ")
    rest = f"## {rest}" if rest else ""
    return body.strip(), "\n\n".join(part.strip() for part in (before, rest) if part.strip())


def write_section(out: Path, heading: str, body: str) -> None:
    """Append a section to a directory's card, replacing one with the same heading."""
    path = out / CARD
    # A card of the source model may have any encoding: its bytes are kept.
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    _, kept = read_section(text, heading)
    with atomic_file(path) as partial:
        section = f"{kept}\n\n## {heading}\n\n{body}".lstrip()
        partial.write_text(section, encoding="utf-8", errors="surrogateescape")


def write_vision_section(config: Any, out: Path) -> None:
    """Describe how to give images and video to a VLM in stock code, from its configuration."""
    side = config.vision_config.image_size
    grid = getattr(config, "image_grid", "unires")
    body = (
        f"Video frames are resized to a short side of {side} pixels and cropped to the centre, which is what the file\n"
        "of the video processor makes of them in transformers and vLLM.\n\n"
    )
    if grid == "anyres":
        body += "An image given as `image` is read in the AnyRes encoding that this model was aligned with.\n"
    elif grid == "unires":
        rule = getattr(config, "image_grid_rule", "code")
        grids = getattr(config, "image_grids", None)
        most = tuple(map(tuple, grids)) if grids else getattr(config, "image_max_grids", 49)
        body += TILES.format(
            aligned="UniRes (each tile is encoded like a video frame)",
            imports="from lvctx.models.unires import unires_tiles",
            tiles=f'unires_tiles(image, tile={side}, rule="{rule}", max_grids={most})',
        )
    elif grid == "single-unpooled":
        body += (
            "It was aligned with one cropped square per image, not pooled, as in LLaVA's first stage. Stock code does\n"
            "not encode images in this way: the next stage of the alignment chooses another encoding.\n"
        )
    else:
        pixels = read_json(out / "preprocessor_config.json")
        background = tuple(int(mean * 255) for mean in pixels["image_mean"])
        body += TILES.format(
            aligned="one padded square an image, encoded like a video frame",
            imports="from lvctx.vlm.anyres import single_tiles",
            tiles=f'single_tiles(image, {side}, "pad", {background})',
        )
    write_section(out, VISION, body)
