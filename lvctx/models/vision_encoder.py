"""Vision towers: the frozen CLIP or SigLIP encoder that turns squares of pixels into patch features.

A tower is read from its own directory, from a full CLIP or SigLIP, or from a LlavaOnevision VLM; of the latter two only
the tower's tensors are read. The features are those of one hidden layer, by default the second-last of CLIP without CLS
(LLaVA, LongVA section 3.2: 576 x 1024 for ViT-L/14-336) and the last of SigLIP; a VLM's configuration has its own.

Suffixes: N images, P patches, D tower width, S side in pixels.
"""

import copy
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lvctx.artifacts.store import data_offset, read_safetensors_header
from lvctx.artifacts.stored_tensors import keep_in_file, read_stored
from lvctx.artifacts.weights import read_headers, read_range
from lvctx.errors import InputError, library_errors
from lvctx.models.image_processing import Preprocess, crops_frames
from lvctx.models.loading import load_config, resolve_model
from lvctx.models.weight_check import DERIVED, check_shapes
from lvctx.video.squares import FrameMode

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True, kw_only=True)
class TowerFiles:
    """The vision tower of a directory, as described by its configuration; no weights are loaded."""

    path: Path
    """The model directory."""
    config: Any
    """The tower's own CLIPVisionConfig or SiglipVisionConfig."""
    layer: int
    """Index of the hidden state used as features; -1 is the last layer's output, before the final norm."""
    drop_cls: bool
    """Whether the first token is CLS, which is dropped."""
    preprocess: Preprocess
    """Its image preprocessing."""
    frame_mode: FrameMode
    """How a video frame becomes a square: as a VLM's own processor does it; of a tower alone `crop`, as in `align`."""

    @classmethod
    def find(cls, name: str | Path) -> Self:
        """Find the tower of a directory or hub id. Raises InputError if there is no CLIP or SigLIP tower in it."""
        path = resolve_model(name)
        model_config = load_config(path)
        config = getattr(model_config, "vision_config", model_config)
        if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise InputError(
                f"a {config.model_type} model, which has no CLIP or SigLIP tower",
                where=path,
                fix="give a CLIPVisionModel, CLIP, SigLIP or LlavaOnevision directory or hub id",
            )
        for key in ("image_size", "patch_size"):
            if not (isinstance(value := getattr(config, key), int) and value > 0):
                raise InputError(f"{key} of the vision tower is {value!r}", where=path, fix="correct config.json")
        if config.image_size < config.patch_size:
            raise InputError(f"image_size {config.image_size} is below patch_size {config.patch_size}", where=path)
        clip = config.model_type == "clip_vision_model"
        layer = getattr(model_config, "vision_feature_layer", -2 if clip else -1)
        drop_cls = getattr(model_config, "vision_feature_select_strategy", "default" if clip else "full") == "default"
        is_vlm = hasattr(model_config, "vision_feature_select_strategy")
        if not isinstance(layer, int) or not -config.num_hidden_layers - 1 <= layer <= config.num_hidden_layers:
            raise InputError(f"vision_feature_layer is {layer}: it has to be a layer of the tower", where=path)
        return cls(
            path=path,
            config=config,
            layer=layer,
            drop_cls=drop_cls,
            preprocess=Preprocess.from_directory(path),
            frame_mode="crop" if not is_vlm or crops_frames(path) else "squash",
        )

    @property
    def patches_per_frame(self) -> int:
        """P: number of features of one square."""
        patches = (self.config.image_size // self.config.patch_size) ** 2
        has_cls = self.config.model_type == "clip_vision_model"
        return patches + has_cls - self.drop_cls

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one square, pooled 2x2: 144 for CLIP ViT-L/14-336."""
        return math.ceil(math.isqrt(self.patches_per_frame) / 2) ** 2

    @property
    def width(self) -> int:
        """D: channels of one feature."""
        return int(self.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of layers up to the selected one."""
        return self.layer if self.layer >= 0 else int(self.config.num_hidden_layers) + 1 + self.layer

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over weights, shape, layer and preprocessing, independent of where the tower is stored.

        So frames artifacts stay valid when a projector is aligned to a frozen tower, but not when the tower is trained.
        """
        facts = {key: getattr(self.config, key) for key in _SHAPE}
        facts |= {"layer": self.layer, "drop_cls": self.drop_cls, "preprocess": asdict(self.preprocess)}
        hasher = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        headers = {file: read_safetensors_header(file) for file in {file for file, _ in self._tensors().values()}}
        for name, (file, key) in sorted(self._tensors().items()):
            entry = headers[file][key]
            hasher.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\n".encode())
            begin, end = (data_offset(file) + offset for offset in entry["data_offsets"])
            for chunk in read_range(file, begin, end):
                hasher.update(chunk)
        return hasher.hexdigest()

    def _tensors(self) -> dict[str, tuple[Path, str]]:
        """The tower's tensors: name inside the tower -> (file, name in the file)."""
        weights = {name: file for file, header in read_headers(self.path).items() for name in header}
        nested = {key for key in weights if re.search(r"(^|\.)(vision_tower|vision_model)\.", key)}
        tensors = {}
        for key in nested or weights:
            name = re.sub(r"^.*?(vision_tower\.vision_model|vision_tower|vision_model)\.", "", key)
            if not name.endswith("position_ids"):  # a buffer in old checkpoints
                tensors[name] = (self.path / weights[key], key)
        return tensors

    def load(self, dtype: Any, device: str = "cpu") -> nn.Module:
        """The whole transformers model in eval mode. Raises InputError if its tensors do not match.

        On `meta` its parameters stay in their files (`lvctx.artifacts.stored_tensors`).

        Only the tower's own tensors are checked; other parts of a full CLIP or VLM are not read. A SigLIP tower may
        lack its pooling head, which is not used for features; then it is built without.
        """
        from safetensors import safe_open
        from transformers import CLIPVisionModel, SiglipVisionModel

        tensors = self._tensors()
        config = copy.deepcopy(self.config)
        siglip = config.model_type == "siglip_vision_model"
        if siglip and not any(name.startswith("head.") for name in tensors):
            config.vision_use_head = False
        with library_errors("cannot build the tower", where=self.path), torch.device("meta"):
            model: nn.Module = (SiglipVisionModel if siglip else CLIPVisionModel)(config)
        inner: Any = getattr(model, "vision_model", model)  # a level that transformers dropped before 5.23
        headers = read_headers(self.path)
        stored = {name: tuple(headers[file.name][key]["shape"]) for name, (file, key) in tensors.items()}
        expected = {n: tuple(t.shape) for n, t in inner.state_dict().items() if not DERIVED.search(n)}
        check_shapes(stored, expected, f"{self.path}, the vision tower")
        state: dict[str, Tensor] = {}
        in_files = read_stored(self.path) if device == "meta" else {}
        with library_errors("cannot load the tower", where=self.path):
            for name, (file, key) in tensors.items():
                if device == "meta":
                    parameter = nn.Parameter(in_files[key].placeholder(dtype), requires_grad=False)
                    state[name] = keep_in_file(parameter, in_files[key])
                    continue
                with safe_open(file, "pt") as f:
                    state[name] = f.get_tensor(key).to(dtype)
            inner.load_state_dict(state, strict=False, assign=True)
        embeddings = inner.embeddings
        positions = embeddings.position_embedding.weight.shape[0]
        embeddings.position_ids = torch.arange(positions)[None]  # the only buffer; checkpoints do not store it
        return model.to("cpu" if device == "meta" else device).eval().requires_grad_(False)


def load_vision_model(name: str | Path, *, dtype: Any, device: str = "cpu") -> Any:
    """The whole CLIPVisionModel or SiglipVisionModel of a directory or hub id, to build a VLM from."""
    return TowerFiles.find(name).load(dtype, device)


class Tower:
    """A frozen encoder with its preprocessing: squares of pixels in, features of the selected layer out."""

    def __init__(self, files: TowerFiles, *, dtype: Any, device: str) -> None:
        self.files, self.dtype, self.device = files, dtype, device
        self.preprocess = files.preprocess
        self.image_size, self.layer = int(files.config.image_size), files.layer
        self.patches_per_frame, self.width = files.patches_per_frame, files.width
        model = files.load(dtype)
        inner: Any = getattr(model, "vision_model", model)
        # Layers above the selected one are not needed; the remaining ones end in the selected hidden state.
        inner.encoder.layers = inner.encoder.layers[: files.depth]
        inner.post_layernorm = nn.Identity()
        inner.use_head = False
        self.model = model.to(device)

    @property
    def fingerprint(self) -> str:
        """See `TowerFiles.fingerprint`."""
        return self.files.fingerprint

    @torch.inference_mode()
    def encode(self, pixels_N3SS: Tensor, *, batch: int = 64) -> Tensor:
        """Features (N, P, D) in this tower's dtype, on its device."""
        parts = []
        for pixels in pixels_N3SS.split(batch):
            hidden = self.model(pixels.to(self.device, self.dtype)).last_hidden_state
            parts.append(hidden[:, 1:] if self.files.drop_cls else hidden)
        return torch.cat(parts)

    def encode_images(self, images: list[Image.Image] | np.ndarray, *, batch: int = 64) -> Tensor:
        """Features (N, P, D) of square images; see `Preprocess`."""
        return self.encode(self.preprocess(images), batch=batch)


def load_tower(path_or_hub_id: str | Path, *, dtype: Any, device: str = "cpu") -> Tower:
    """The tower of a directory or hub id (a tower, CLIP, SigLIP or VLM), loaded without the language model."""
    return Tower(TowerFiles.find(path_or_hub_id), dtype=dtype, device=device)
