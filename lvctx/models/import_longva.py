"""Convert LongVA's released checkpoints shard by shard; every tensor is converted or listed as left out.

`lmms-lab/LongVA-7B` and `LongVA-7B-DPO` are LLaVA checkpoints, and so is LongVA's baseline,
`lmms-lab/LLaVA-NeXT-Video-7B-32K`: see `llava_format` for how they differ. Memory is needed
for the largest tensor that has to be built (none for LongVA-7B, whose vocabulary has room for the placeholders), not
for the model.
"""

import ast
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.model_config import read_model_config
from lvctx.artifacts.store import fingerprint, read_json
from lvctx.artifacts.weights import WIDTHS, Weight, read_weights
from lvctx.config import OnProgress
from lvctx.errors import InputError, UsageError
from lvctx.models import llava_format as llava
from lvctx.models.card import write_vision_section
from lvctx.models.card_metadata import write_card
from lvctx.models.convert_config import ImportLongvaConfig
from lvctx.models.convert_stream import write_converted
from lvctx.models.loading import load_config, load_tokenizer, resolve_model
from lvctx.models.saving import forget_origin, save_tokenizer
from lvctx.models.side_files import write_side_files
from lvctx.models.unires import MAX_GRIDS, MaxGrids, grids_up_to, set_image_max_grids
from lvctx.models.vision_encoder import load_vision_model
from lvctx.models.vlm_assembly import (
    PIXELS_FILE,
    add_visual_tokens,
    flatten_content,
    newline_id,
    tokens_per_frame,
    vlm_config,
    write_processors,
)
from lvctx.models.weight_check import DERIVED, check_shapes

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
NEWLINE_PARAMETER = "image_newline"
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Columns and rows of LLaVA-NeXT's `image_grid_pinpoints`, the only ones that our AnyRes has (`lvctx.vlm.anyres`)."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ImportLongvaJob:
    """A checked import: everything but the weights' bytes."""

    out: Path
    """Directory to write."""
    source: Path
    """Resolved LLaVA checkpoint."""
    config: Any
    """LlavaOnevisionConfig of the result."""
    tokenizer: Any
    """Tokenizer with the placeholders."""
    pixels: Mapping[str, Any]
    """Image processor configuration of the vision tower."""
    tower: Path | None
    """Where the tower's weights come from; None if they are in the checkpoint."""
    shards: list[dict[str, Weight]]
    """The checkpoint's tensors under our names."""
    dropped: list[str]
    """Names of the omitted tensors: computed from the configuration, tied, or unused."""
    learned_newline: bool
    """Whether the checkpoint's own `image_newline` is used, and not the embedding of "\\n"."""
    rows: int
    """Rows of the embedding: those of the checkpoint, or more if these have no room for the placeholders."""
    provenance: Provenance
    """What identifies the run."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the row and the manifest."""
        return {
            "context": self.config.text_config.max_position_embeddings,
            "tokens_per_frame": tokens_per_frame(self.config),
            "dropped": self.dropped,
            "tower": str(self.tower) if self.tower else "inside",
            "embedding_rows": self.rows,
        }


def plan_import_longva(config: ImportLongvaConfig) -> ImportLongvaJob:
    """Check a LLaVA checkpoint tensor by tensor, from headers only.

    Raises InputError for a checkpoint that is incomplete or has tensors that do not belong in the result, and
    UsageError for an output that is the checkpoint itself.
    """
    path = resolve_model(config.source)
    if config.out.resolve() == path.resolve():
        raise UsageError("-o is the checkpoint's own directory", fix="choose another directory")
    flat = read_model_config(path)
    text = llava.text_config(flat, context=config.context, where=path)
    stored = {name: weight for shard in read_weights(path).values() for name, weight in shard.items()}
    inside = any(name.startswith(llava.TOWER_PREFIX) for name in stored)
    shapes = {name: weight.shape for name, weight in stored.items() if not DERIVED.search(name)}
    vision, pixels, tower_path = _tower(path, flat, config.tower, shapes if inside else None)
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None and text.model_type == "mistral":
        tokenizer.chat_template = llava.MISTRAL_TEMPLATE
    add_visual_tokens(tokenizer, path)
    vlm = vlm_config(text, vision, tokenizer)
    vlm.vision_feature_layer = flat.get("mm_vision_select_layer", -2)
    is_spatial = flat.get("mm_patch_merge_type") == llava.SPATIAL
    _set_image_encoding(vlm, flat.get("image_grid_pinpoints"), is_spatial=is_spatial, where=path)
    side = vision.image_size // vision.patch_size
    if side % 2:
        raise InputError(f"{side} x {side} features cannot be pooled 2x2: the side is odd", where=path)
    expected = llava.expected(text, vision, tower=inside)
    if is_spatial:
        expected[llava.NEWLINE] = (text.hidden_size,)
    unread = {"lm_head.weight" if text.tie_word_embeddings else "", "" if is_spatial else llava.NEWLINE}
    check_shapes({name: shape for name, shape in shapes.items() if name not in unread}, expected, path)
    dropped = sorted(stored.keys() - expected.keys())
    renamed = llava.rename(set(expected), to_llava=False)
    shards = [
        {renamed[name]: weight for name, weight in shard.items() if name in expected}
        for shard in read_weights(path).values()
    ]
    vlm.architectures = ["LlavaOnevisionForConditionalGeneration"]
    vlm.dtype = text.dtype = DTYPES[stored["model.norm.weight"].dtype]
    rows = text.vocab_size
    if len(tokenizer) > rows:
        rows = text.vocab_size = -(-len(tokenizer) // 64) * 64
    forget_origin(vlm)
    made_of = {"model": fingerprint(path)} | ({"tower": fingerprint(tower_path)} if tower_path else {})
    return ImportLongvaJob(
        out=config.out,
        source=path,
        config=vlm,
        tokenizer=tokenizer,
        pixels=pixels,
        tower=None if inside else tower_path,
        shards=shards,
        dropped=dropped,
        learned_newline=is_spatial,
        rows=rows,
        provenance=Provenance(
            schema=schemas.MODEL, command="import-longva", config={"context": config.context}, inputs=made_of
        ),
    )


def _set_image_encoding(vlm: Any, pinpoints: Any, *, is_spatial: bool, where: object) -> None:
    """Store in a VLM's configuration how it encodes images: UniRes, or AnyRes for `spatial_unpad`.

    Raises InputError for AnyRes with other grids than LLaVA-NeXT's.
    """
    tile = vlm.vision_config.image_size
    grids = read_pinpoints(pinpoints, tile=tile, where=where)
    if not is_spatial:
        if grids != MAX_GRIDS:
            set_image_max_grids(vlm, grids)
    elif grids != ANYRES_GRIDS:
        raise InputError(f"image_grid_pinpoints has grids {str(grids)[:60]}", where=where, fix="use LLaVA-NeXT's five")
    else:
        vlm.image_grid, vlm.vision_aspect_ratio = "anyres", "anyres_max_4"
        vlm.image_grid_pinpoints = [[tile * w, tile * h] for w, h in ANYRES_GRIDS]


def read_pinpoints(pinpoints: Any, *, tile: int, where: object) -> MaxGrids:
    """The grids that `image_grid_pinpoints` of a LLaVA config.json allows an image; LongVA's 49 if there are none.

    They are sizes in pixels (width, height) as a list, or as its text, or a range of grids written as
    "(1x1),...,(6x6)". A list that equals LongVA's own for some number of tiles becomes that number. Raises InputError
    for anything else, and for a size that is not a multiple of the tower's.
    """
    if pinpoints is None:
        return MAX_GRIDS
    wrong = InputError(
        f"image_grid_pinpoints is {str(pinpoints)[:60]!r}", where=where, fix=f"give multiples of {tile} px"
    )
    if isinstance(pinpoints, str):
        corners = [(int(w), int(h)) for w, h in re.findall(r"\((\d{1,4})x(\d{1,4})\)", pinpoints)]
        if corners:
            (left, top), (right, bottom) = corners[0], corners[-1]
            pinpoints = [[w * tile, h * tile] for w in range(left, right + 1) for h in range(top, bottom + 1)]
        else:
            try:
                pinpoints = ast.literal_eval(pinpoints)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise wrong from None
    if not isinstance(pinpoints, list | tuple) or not pinpoints:
        raise wrong
    for pair in pinpoints:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong
        if not all(type(n) is int and n > 0 and n % tile == 0 for n in pair):
            raise wrong
    grids = [(w // tile, h // tile) for w, h in pinpoints]
    most = max(w * h for w, h in grids)
    return most if grids == grids_up_to(most) else tuple(grids)


def _tower(
    path: Path, flat: Mapping[str, Any], tower: str | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[Any, Mapping[str, Any], Path | None]:
    """Configuration, pixels and directory of the tower; `shapes` are the checkpoint's if it has the tower's weights."""
    named = str(flat.get("mm_vision_tower") or flat.get("vision_tower"))
    if tower is None and (path / "tower" / "config.json").is_file():
        directory = path / "tower"
    elif tower is None and shapes is not None and named.startswith(llava.CLIP):
        return llava.clip_config(shapes, named, where=path), llava.CLIP_PIXELS, None
    else:
        try:
            directory = resolve_model(tower or named, weights=shapes is None)
        except InputError as e:
            raise InputError(f"tower {e}", where=path, fix="give --tower") if tower is None else e from None
    config = load_config(directory)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise InputError(f"a {config.model_type} model is not a CLIP tower", where=directory, fix="give --tower")
    if not (directory / PIXELS_FILE).is_file():
        raise InputError(f"no {PIXELS_FILE}", where=directory, fix="copy it from the tower's original directory")
    pixels = read_json(directory / PIXELS_FILE)
    return config, llava.pixels_of(pixels), directory


def run_import_longva(
    job: ImportLongvaJob, *, command: str = "", resume: str, force: bool, on_progress: OnProgress
) -> None:
    """Write the VLM, or continue it; a finished one is not changed. Raises InputError if writing fails.

    `command` is the command line, without local paths, for the model card.
    """
    write_converted(
        job.out,
        job.provenance,
        shards=lambda: _shards(job),
        finish=lambda: _finish(job, command),
        resume=resume,
        force=force,
        on_progress=on_progress,
    )


def _shards(job: ImportLongvaJob) -> list[Mapping[str, Weight]]:
    """The shards to write: the checkpoint's with the added rows, and one for a tower that is not in the checkpoint."""
    shards: list[Mapping[str, Weight]] = []
    for shard in job.shards:
        made = {n: _grown(w, job.rows) if n in (EMBEDDING, HEAD) else w for n, w in shard.items()}
        if EMBEDDING in shard and not job.learned_newline:
            made[NEWLINE_PARAMETER] = _row(shard[EMBEDDING], newline_id(job.tokenizer))
        shards.append(made)
    if job.tower is not None:
        state = load_vision_model(job.tower, dtype=job.config.dtype).state_dict()
        shards.append(
            {
                "vision_tower.vision_model." + name.removeprefix("vision_model."): _made(value)
                for name, value in state.items()
                if not DERIVED.search(name)
            }
        )
    return shards


def _finish(job: ImportLongvaJob, command: str) -> dict[str, Any]:
    """Write everything but the weights, and return facts for the manifest."""
    out = job.out
    job.config.save_pretrained(out)
    generation = "generation_config.json"
    if (job.source / generation).is_file():
        shutil.copyfile(job.source / generation, out / generation)
    else:
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(job.config.text_config).save_pretrained(out)
    flatten_content(job.tokenizer)
    save_tokenizer(job.tokenizer, job.config, out)
    write_processors(job.config, job.pixels, out)
    write_vision_section(job.config, out)
    write_side_files(out)
    sources = [job.source, *([job.tower] if job.tower else [])]
    write_card(out, job.provenance, job.facts, sources=sources, command=command)
    return job.facts


def _made(value: Tensor) -> Weight:
    name = next(name for name, dtype in DTYPES.items() if dtype == value.dtype)
    flat = value.detach().contiguous().flatten().view(torch.uint8)
    return Weight(dtype=name, shape=tuple(value.shape), chunks=lambda: iter([flat.numpy().data]))


def _row(weight: Weight, row: int) -> Weight:
    """One row of a matrix, as a vector; reads only that row."""
    width = weight.shape[1] * WIDTHS[weight.dtype]
    read = bytearray()
    chunks = weight.chunks()
    while len(read) < (row + 1) * width:
        read += next(chunks)
    return Weight(dtype=weight.dtype, shape=weight.shape[1:], chunks=lambda: iter([read[row * width :][:width]]))


def _grown(weight: Weight, rows: int) -> Weight:
    """An embedding or a head with more rows, each the mean of the old ones: see `vlm_assembly.grow_embedding`."""
    old, width = weight.shape
    if rows == old:
        return weight

    def chunks() -> Iterator[Any]:
        content = bytearray().join(weight.chunks())
        mean = torch.frombuffer(content, dtype=DTYPES[weight.dtype]).view(old, width).float().mean(0)
        yield content
        yield from _made(mean.to(DTYPES[weight.dtype]).expand(rows - old, width)).chunks()

    return Weight(dtype=weight.dtype, shape=(rows, width), chunks=chunks)
