"""Train the nano recipe's vision tower from nothing: a small CLIPVisionModel for drawn shapes.

Every patch of hidden layer -2 (the projector's input) is trained with linear heads to classify which shape and
which colour its image shows, and which of both is under the patch itself, or that there is nothing. So
shape and colour are in each visual token as directions that a small MLP can turn into a language model's
words. The layer above stays an identity: it is not used. The heads are discarded.

    python recipes/nano/train_tower.py --photos .cache/nano/photos -o recipes/nano/tower   # on two cores: 15 minutes

Suffixes: B images, P patches (H x W), D tower width, F frequencies, X classes of both heads.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from photos import load_photos
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from lvctx.device import resolve_dtype
from lvctx.video.drawn_images import COLORS, SHAPES, draw_blank, draw_image_with_mask

COLOR_NAMES = list(COLORS)
BLANK = 0.25
"""Share of images that show nothing."""
MEAN = STD = 0.5


Job = tuple[int, int, int, int, int, tuple[Path, ...]]


def draw_chunk(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images: uint8 (B, 3, H, W), labels int64 (B, 2), which patches the shape covers bool (B, P)."""
    seed, chunk, count, size, patch, sources = job
    photos = load_photos(sources)
    rng = np.random.default_rng([seed, chunk])
    side = size // patch
    images = np.empty((count, 3, size, size), np.uint8)
    labels = np.full((count, 2), (len(SHAPES), len(COLOR_NAMES)), np.int64)
    covered = np.zeros((count, side * side), bool)
    for i in range(count):
        if rng.random() < BLANK:
            image = draw_blank(rng, size=size, photos=photos)
        else:
            shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOR_NAMES)))
            image, mask_HW = draw_image_with_mask(
                rng, size=size, shape=SHAPES[shape], color=COLOR_NAMES[color], photos=photos
            )
            labels[i] = shape, color
            covered[i] = mask_HW.reshape(side, patch, side, patch).mean((1, 3)).reshape(-1) > 0.4
        images[i] = np.asarray(image).transpose(2, 0, 1)
    return images, labels, covered


def draw_many(
    seed: int, count: int, size: int, patch: int, photos: tuple[Path, ...], workers: int
) -> list[torch.Tensor]:
    jobs = [(seed, chunk, 500, size, patch, photos) for chunk in range(math.ceil(count / 500))]
    with Pool(workers) as pool:
        parts = pool.map(draw_chunk, jobs, chunksize=1)
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]


def augment(images: torch.Tensor, covered: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip half of the batch (no shape's name depends on it), vary exposure a little, and normalise."""
    half = len(images) // 2
    images = torch.cat([images[:half].flip(-1), images[half:]])
    grid = covered.unflatten(1, (side, side))
    covered = torch.cat([grid[:half].flip(-1), grid[half:]]).flatten(1)
    gain = torch.empty(len(images), 1, 1, 1).uniform_(0.92, 1.06)
    pixels = (images.float() / 255 * gain + torch.randn(images.shape[0], 3, 1, 1) * 0.01).clamp(0, 1)
    return (pixels - MEAN) / STD, covered


def autocast() -> torch.autocast:
    """Matrix products in bfloat16 where the processor has instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=resolve_dtype("auto", "cpu") == "bfloat16")


class TowerClassifier(nn.Module):
    """The tower up to hidden layer -2, and two linear heads: what the image shows, what the patch shows."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.classes = (len(SHAPES) + 1, len(COLORS) + 1)
        self.picture_head = nn.Linear(tower.config.hidden_size, sum(self.classes))
        self.patch_head = nn.Linear(tower.config.hidden_size, sum(self.classes))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        patches_BPD = hidden[:, 1:]
        return self.picture_head(patches_BPD).float(), self.patch_head(patches_BPD).float()


def losses(
    model: TowerClassifier, pixels: torch.Tensor, labels: torch.Tensor, covered: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    whole_BPX, local_BPX = model(pixels)
    nothing = torch.tensor([n - 1 for n in model.classes])
    loss = pixels.new_zeros(())
    right: list[torch.Tensor] = []
    for task, (whole, local) in enumerate(
        zip(whole_BPX.split(model.classes, -1), local_BPX.split(model.classes, -1), strict=True)
    ):
        target_BP = labels[:, task, None].expand(covered.shape)
        loss = loss + F.cross_entropy(whole.flatten(0, 1), target_BP.flatten())
        here_BP = torch.where(covered, target_BP, nothing[task])
        loss = loss + 0.5 * F.cross_entropy(local.flatten(0, 1), here_BP.flatten())
        right.append(whole.softmax(-1).mean(1).argmax(-1) == labels[:, task])
    return loss, torch.stack(right, 1)


def make_optimizers(model: nn.Module, layers: nn.ModuleList, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest: in 200 steps further than AdamW alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in layers.parameters() if p.requires_grad and p.ndim == 2]
    inner = {id(p) for p in matrices}
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in inner]
    plain = [p for p in trained if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, lr=3 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fit(
    model: nn.Module,
    layers: nn.ModuleList,
    batch: Callable[[int], Batch],
    check: Callable[[], None],
    *,
    steps: int,
    lr: float,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]] = losses,
) -> None:
    """Train on what `batch(step)` gives: pixels, labels, covered patches. `check` is called every 300 steps."""
    optimizers = make_optimizers(model, layers, lr)
    warmup = max(1, steps // 20)

    def factor(i: int) -> float:
        return min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, i - warmup) / (steps - warmup))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    start = time.monotonic()
    for step in range(1, steps + 1):
        given = batch(step)
        with autocast():
            loss, right = forward(model, *given)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps:
            shape, color = right.float().mean(0).tolist()
            seconds = time.monotonic() - start
            print(f"step {step} loss {loss:.3f} shape {shape:.3f} color {color:.3f} {seconds:.0f} s", flush=True)
        if step % 300 == 0:
            check()


@torch.no_grad()
def place(tower: CLIPVisionModel, side: int) -> None:
    """Begin with positions as sines and cosines of row and column, which a tower otherwise spends long to find."""
    width = tower.config.hidden_size
    frequency_F = math.pi / (2 * side) ** (torch.arange(width // 4) / (width // 4))
    rows_HW, columns_HW = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles_PF = [axis.flatten()[:, None] * frequency_F for axis in (columns_HW, rows_HW)]
    waves_PD = torch.cat([wave for angle in angles_PF for wave in (angle.sin(), angle.cos())], 1)
    tower.embeddings.position_embedding.weight[1:] = 0.3 * waves_PD


@torch.no_grad()
def evaluate(model: TowerClassifier, held_out: list[torch.Tensor]) -> dict[str, float]:
    model.eval()
    right = []
    for images, labels, covered in zip(*(column.split(250) for column in held_out), strict=True):
        with autocast():
            right.append(losses(model, (images.float() / 255 - MEAN) / STD, labels, covered)[1])
    model.train()
    right_B2, shown_B = torch.cat(right).float(), held_out[1][:, 0] < len(SHAPES)
    shape, color = right_B2[shown_B].mean(0).tolist()
    both = right_B2[shown_B].prod(1).mean().item()
    return {"shape": shape, "color": color, "both": both, "nothing": right_B2[~shown_B].prod(1).mean().item()}


@torch.no_grad()
def centre(tower: CLIPVisionModel, images: torch.Tensor) -> None:
    """Take the mean feature over `images` out of hidden layer -2, by way of the bias that is added last.

    The constant part says nothing; a fresh projector would otherwise have to unlearn it.
    """
    tower.eval()
    hidden_BPD = [
        tower((part.float() / 255 - MEAN) / STD, output_hidden_states=True).hidden_states[-2][:, 1:]
        for part in images.split(250)
    ]
    tower.encoder.layers[-2].mlp.fc2.bias -= torch.cat(hidden_BPD).mean((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images, folders, clips to draw on")
    parser.add_argument("--size", type=int, default=120, help="image side, pixels")
    parser.add_argument("--patch", type=int, default=12, help="patch side, pixels")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6, help="the last stays an identity")
    parser.add_argument("--images", type=int, default=72_000, help="distinct training images")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    start = time.monotonic()
    images, labels, covered = draw_many(args.seed, args.images, args.size, args.patch, tuple(args.photos), args.workers)
    held_out = draw_many(args.seed + 1_000_003, 2000, args.size, args.patch, tuple(args.photos), args.workers)
    print(f"drew {len(images)} images in {time.monotonic() - start:.0f} s", flush=True)

    config = CLIPVisionConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        image_size=args.size,
        patch_size=args.patch,
        hidden_act="quick_gelu",
        projection_dim=args.width,
        attention_dropout=0.0,
        attn_implementation="eager",  # on a CPU the fused kernel's backward pass takes five times as long
    )
    tower = CLIPVisionModel(config)
    last = tower.encoder.layers[-1]
    for module in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    last.requires_grad_(False)
    side = args.size // args.patch
    place(tower, side)
    model = TowerClassifier(tower)
    model.train()
    forward = torch.compile(losses) if args.compile else losses

    order = torch.empty(0, dtype=torch.int64)

    def batch(step: int) -> Batch:
        nonlocal order
        if len(order) < args.batch:
            order = torch.randperm(len(images))
        pick, order = order[: args.batch], order[args.batch :]
        pixels, covered_BP = augment(images[pick], covered[pick], side)
        return pixels, labels[pick], covered_BP

    def check() -> None:
        print("held out " + json.dumps(evaluate(model, held_out)), flush=True)

    fit(model, tower.encoder.layers, batch, check, steps=args.steps, lr=args.lr, forward=forward)
    check()
    centre(tower, held_out[0][:500])
    tower.to(torch.bfloat16).save_pretrained(args.output)
    CLIPImageProcessor(
        size={"shortest_edge": args.size},
        crop_size={"height": args.size, "width": args.size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(args.output)


if __name__ == "__main__":
    main()
