"""Warm up the nano projector before a language model is in the loop: from images to the words that name them.

Each visual token of a drawn image regresses to the sum of the language model's own input embeddings of the
image's colour and shape (towards "nothing" where nothing is drawn). It takes a minute, and spares the alignment the
long plateau in which the language model cannot yet distinguish visual tokens.

    python recipes/nano/warm_projector.py --lm LM --tower recipes/nano/tower --photos CLIP... -o start.safetensors

Suffixes: N images, P patches, D tower width, E language-model width.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from draw_data import COLOR_NAMES
from photos import load_photos
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lvctx.device import resolve_dtype
from lvctx.models.loading import load_model, load_tokenizer, resolve_model
from lvctx.models.vision_encoder import load_tower
from lvctx.video.drawn_images import SHAPES, draw_blank, draw_image

IMAGES, HELD_OUT, STEPS, BATCH, LR, BLANK = 2000, 200, 250, 64, 2e-3, 0.3


def draw(index: int, photos: list[np.ndarray], size: int) -> tuple[Image.Image, list[str]]:
    """An image and the words that name it."""
    rng = np.random.default_rng([7, index])
    if rng.random() < BLANK:
        return draw_blank(rng, size=size, photos=photos), ["nothing"]
    shape, color = SHAPES[rng.integers(len(SHAPES))], COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
    return draw_image(rng, size=size, shape=shape, color=color, photos=photos), [color, shape]


def main() -> None:
    """Draw, encode, regress, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True, help="language model: its input embeddings are the targets")
    parser.add_argument("--tower", required=True)
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="images, folders, clips to draw on")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.lm)
    table = load_model(resolve_model(args.lm), dtype=torch.float32).get_input_embeddings().weight.detach()

    def embed(word: str) -> Tensor:
        return table[tokenizer.encode(" " + word, add_special_tokens=False)].mean(0)

    tower = load_tower(args.tower, dtype=getattr(torch, resolve_dtype("auto", "cpu")))
    photos = load_photos(tuple(args.photos))
    drawn = [draw(i, photos, tower.image_size) for i in range(IMAGES)]
    features_NPD = tower.encode_images([image for image, _ in drawn]).float()
    targets_NE = torch.stack([torch.stack([embed(w) for w in words]).sum(0) for _, words in drawn])
    first, second = nn.Linear(tower.width, table.shape[1]), nn.Linear(table.shape[1], table.shape[1])
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        chosen = torch.randint(0, IMAGES - HELD_OUT, (BATCH,))
        out_NPE = second(F.gelu(first(features_NPD[chosen])))
        loss = F.mse_loss(out_NPE, targets_NE[chosen][:, None].expand_as(out_NPE)) / targets_NE.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        outputs_NE = second(F.gelu(first(features_NPD[-HELD_OUT:]))).mean(1)
    for name, names, place in (("colour", COLOR_NAMES, 0), ("shape", list(SHAPES), 1)):
        words_NE = F.normalize(torch.stack([embed(word) for word in names]), dim=-1)
        nearest = (F.normalize(outputs_NE, dim=-1) @ words_NE.T).argmax(1).tolist()
        pairs = zip(nearest, (words for _, words in drawn[-HELD_OUT:]), strict=True)
        right = [names[n] == words[place] for n, words in pairs if len(words) > 1]
        print(f"held out, nearest {name} word: {sum(right) / len(right):.3f} of {len(right)}")
    parts = {"linear_1": first, "linear_2": second}
    tensors = {f"multi_modal_projector.{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(args.out))


if __name__ == "__main__":
    main()
