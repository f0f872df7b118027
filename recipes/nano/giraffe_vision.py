"""Train the vision part of the nano Qwen2-VL: its tower on drawn shapes, then its merger towards word embeddings.

The tower begins with the layers of the CLIP-architecture one that `train_tower.py` trained from nothing (`make tower`)
and is trained likewise, now with rotary positions and on images of three sizes: 4, 9 and 16 visual tokens. Then each
visual token of an image regresses to the sum of the language model's embeddings of its colour and its shape, as
`warm_projector.py` does.

    python recipes/nano/giraffe_vision.py --lm LM --tower recipes/nano/tower --photos CLIP... -o vision.safetensors

Suffixes: B images, P patches, C channels of a patch, D tower width, T visual tokens, E language-model width.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draw_data import COLOR_NAMES
from giraffe_model import PATCH, VISION
from safetensors.torch import save_file
from torch import Tensor, nn
from train_tower import MEAN, STD, Batch, TowerClassifier, augment, autocast, draw_many, evaluate, fit
from transformers import CLIPVisionModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

from lvctx.models.loading import load_model, load_tokenizer, resolve_model
from lvctx.video.drawn_images import SHAPES

MERGE = 2
SIZES = {48: 128, 72: 64, 96: 48}
"""Side of an image, pixels -> images of a batch: about as many patches each time."""
LARGEST = max(SIZES)
WORDS_STEPS, WORDS_BATCH, WORDS_LR = 600, 64, 2e-3


def resize(images: Tensor, covered: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 of the largest size at another, and which patches the shape then covers (B, P)."""
    if size == LARGEST:
        return images, covered
    small = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    grid = covered.float().unflatten(1, (LARGEST // PATCH, -1))[:, None]
    return small.to(torch.uint8), F.adaptive_avg_pool2d(grid, size // PATCH).flatten(1) > 0.4


def cut(pixels: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) as patches (B, P, C) in the order that the processor gives them."""
    count, side = len(pixels), pixels.shape[-1] // PATCH // MERGE
    parts = pixels.reshape(count, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return parts[:, :, :, :, :, :, None].expand(*[-1] * 6, 2, -1, -1).reshape(count, (side * MERGE) ** 2, -1)


def raster(side: int) -> Tensor:
    """Where patch p of an image in raster order is in the processor's order."""
    half = torch.arange(side * side).reshape(side // MERGE, side // MERGE, MERGE, MERGE)
    return half.permute(0, 2, 1, 3).flatten()


def look(tower: Any, patches_BPC: Tensor) -> Tensor:
    """The stock tower's features of images of one size before its merger (B, P, D), all images at once.

    The tower itself goes from image to image, which makes training slow.
    """
    angles = rotary(tower, round(patches_BPC.shape[1] ** 0.5))
    hidden_BPD = F.linear(patches_BPC, tower.patch_embed.proj.weight.flatten(1))
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden_BPD)).unflatten(-1, (3, attention.num_heads, -1))
        q, k = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], *angles)
        q, k, v = (x.to(qkv.dtype).transpose(1, 2) for x in (q, k, qkv[:, :, 2]))
        # Written out: on a CPU the fused kernel's backward pass takes five times as long.
        weights = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1).to(v.dtype)
        hidden_BPD = hidden_BPD + attention.proj((weights @ v).transpose(1, 2).flatten(2))
        hidden_BPD = hidden_BPD + block.mlp(block.norm2(hidden_BPD))
    return hidden_BPD


@functools.cache
def rotary(tower: Any, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one image's patches, as the stock forward gives them to its first block."""
    held: list[tuple[Tensor, Tensor]] = []
    hook = tower.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: held.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        tower(torch.zeros(side * side, 3 * 2 * PATCH**2), grid_thw=torch.tensor([[1, side, side]]))
    hook.remove()
    return held[0]


class QwenTowerClassifier(TowerClassifier):
    """A Qwen2-VL tower and the classification heads it is trained with."""

    def __init__(self, tower: Any) -> None:
        nn.Module.__init__(self)
        self.tower = tower
        self.classes = (len(SHAPES) + 1, len(COLOR_NAMES) + 1)
        self.picture_head = nn.Linear(tower.config.embed_dim, sum(self.classes))
        self.patch_head = nn.Linear(tower.config.embed_dim, sum(self.classes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        patches_BPD = look(self.tower, cut(pixels))[:, raster(pixels.shape[-1] // PATCH)]
        return self.picture_head(patches_BPD).float(), self.patch_head(patches_BPD).float()


@torch.no_grad()
def take_layers(tower: Any, start: Path) -> None:
    """Begin with the layers of a CLIPVisionModel up to hidden layer -2, without its positions and its class token."""
    clip = CLIPVisionModel.from_pretrained(start, dtype=torch.float32)
    patch = clip.embeddings.patch_embedding.weight[:, :, None].expand(-1, -1, 2, -1, -1)
    # A normalisation follows there that Qwen2-VL lacks: about its scale, halved as an image is given twice.
    tower.patch_embed.proj.weight.copy_(patch / patch.flatten(1).norm(dim=1).mean() / 2**0.5)
    for block, layer in zip(tower.blocks, clip.encoder.layers[:-1], strict=True):
        attention = layer.self_attn
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            getattr(block.attn.qkv, name).copy_(torch.cat(parts))
            getattr(block.attn.proj, name).copy_(getattr(attention.out_proj, name))
            getattr(block.norm1, name).copy_(getattr(layer.layer_norm1, name))
            getattr(block.norm2, name).copy_(getattr(layer.layer_norm2, name))
            getattr(block.mlp.fc1, name).copy_(getattr(layer.mlp.fc1, name))
            getattr(block.mlp.fc2, name).copy_(getattr(layer.mlp.fc2, name))


def words_table(lm: str) -> tuple[Tensor, Tensor]:
    """Embeddings (shapes + 1, E) and (colours + 1, E); where nothing is shown the two sum to that of "nothing"."""
    tokenizer, model = load_tokenizer(lm), load_model(resolve_model(lm), dtype=torch.float32)
    table = model.get_input_embeddings().weight.detach()

    def embed(word: str) -> Tensor:
        return table[tokenizer.encode(" " + word, add_special_tokens=False)].mean(0)

    shapes, colors = ([embed(name) for name in names] for names in (SHAPES, COLOR_NAMES))
    nothing = embed("nothing")
    return torch.stack([*shapes, nothing]), torch.stack([*colors, torch.zeros_like(nothing)])


@torch.no_grad()
def features(tower: Any, images: Tensor, covered: Tensor, size: int) -> Tensor:
    """What the tower makes of images at a size: (B, P, D)."""
    with autocast():
        small = resize(images, covered, size)[0].split(250)
        return torch.cat([look(tower, cut((part.float() / 255 - MEAN) / STD)) for part in small])


def train_merger(tower: Any, training: list[Tensor], held_out: list[Tensor], lm: str) -> None:
    """Train the merger on some images; returns how often the nearest word is the right one for others."""
    shapes, colors = words_table(lm)
    images, labels, covered = training
    targets_BE = shapes[labels[:, 0]] + colors[labels[:, 1]]
    features_by_size = {size: features(tower, images, covered, size) for size in SIZES}
    optimizer = torch.optim.AdamW(tower.merger.parameters())
    for step in range(WORDS_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = WORDS_LR * min(1, (step + 1) / 30) * (1 - step / WORDS_STEPS)
        loss = torch.zeros(())
        for size in SIZES:
            pick = torch.randint(0, len(images), (WORDS_BATCH,))
            out_BTE = tower.merger(features_by_size[size][pick].float()).unflatten(0, (WORDS_BATCH, -1))
            loss = loss + F.mse_loss(out_BTE, targets_BE[pick][:, None].expand_as(out_BTE)) / targets_BE.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels, covered = held_out
    shown = labels[:, 0] < len(SHAPES)
    for size in SIZES:
        with torch.no_grad():
            patches_BPD = features(tower, images[shown], covered[shown], size).float()
            seen_BE = tower.merger(patches_BPD).unflatten(0, (len(patches_BPD), -1)).mean(1)
        said = []
        for column, name, table in ((0, "shape", shapes), (1, "colour", colors)):
            words = F.normalize(table[:-1], dim=-1)
            right = (F.normalize(seen_BE, dim=-1) @ words.T).argmax(1) == labels[shown, column]
            said.append(f"{name} {right.float().mean():.3f}")
        print(f"held out, nearest word, {size} px: {', '.join(said)} of {int(shown.sum())}", flush=True)


def main() -> None:
    """Draw, train, save tower and merger in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--lm", required=True, help="language model: its input embeddings are the merger's targets")
    parser.add_argument("--tower", type=Path, required=True, help="CLIP-architecture tower of train_tower.py")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images, folders, clips to draw on")
    parser.add_argument("--images", type=int, default=20_000, help="distinct training images")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.monotonic()
    drawing = (LARGEST, PATCH, tuple(args.photos), args.workers)
    images, labels, covered = draw_many(args.seed, args.images, *drawing)
    held_out = draw_many(args.seed + 1_000_003, min(2000, args.images), *drawing)
    print(f"drew {len(images)} images in {time.monotonic() - start:.0f} s", flush=True)

    width = load_model(resolve_model(args.lm)).config.hidden_size
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**VISION, hidden_size=width))
    tower.merger.requires_grad_(False)
    take_layers(tower, args.tower)
    classifier = QwenTowerClassifier(tower)

    def batch(step: int) -> Batch:
        size = list(SIZES)[step % len(SIZES)]
        pick = torch.randint(0, len(images), (SIZES[size],))
        small, here = resize(images[pick], covered[pick], size)
        pixels, here = augment(small, here, size // PATCH)
        return pixels, labels[pick], here

    def check() -> None:
        for size in SIZES:
            small = [
                torch.cat(column)
                for column in zip(
                    *(resize(p, c, size) for p, c in zip(held_out[0].split(500), held_out[2].split(500), strict=True)),
                    strict=True,
                )
            ]
            print(
                f"held out, {size} px " + json.dumps(evaluate(classifier, [small[0], held_out[1], small[1]])),
                flush=True,
            )

    fit(classifier, tower.blocks, batch, check, steps=args.steps, lr=args.lr)
    check()
    tower.requires_grad_(False).eval()
    tower.merger.requires_grad_(True)
    train_merger(tower, [column[:6000] for column in (images, labels, covered)], held_out, args.lm)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tower.state_dict().items()}, str(args.out))


if __name__ == "__main__":
    main()
