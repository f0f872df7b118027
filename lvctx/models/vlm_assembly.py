"""The VLM: a CLIP or SigLIP tower, a two-layer GELU projector and a language model, as stock LlavaOnevision.

A frame's P tower features go through the projector and a 2x2 average pool; frames follow each other without delimiters
and one embedding of "\\n" closes the block, so the sequence is LongVA's `<image>\\n{question}` (LongVA section 3.2,
UniRes). LlavaOnevision pools bilinearly to half the side, which for an even side is exactly the 2x2 average.

Shapes: F frames, P features a frame, T = (sqrt(P)/2)^2 tokens a frame, D tower width, E language-model width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lvctx.artifacts.store import read_json, write_json
from lvctx.artifacts.stored_tensors import grow_rows, read_rows
from lvctx.errors import InputError
from lvctx.models.card import write_vision_section
from lvctx.models.chat_template import ChatEncoder, Visual, chat_encoder
from lvctx.models.loading import device_of
from lvctx.models.lora import Gather
from lvctx.models.saving import save_model

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
ImageGrid = Literal["unires", "anyres", "single", "single-unpooled"]
"""How a model was trained to encode an image: see `lvctx.vlm.image_tiling`. A video frame is always one pooled grid."""

FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- set turn = namespace(text='') -%}
{%- if m['content'] is string -%}{%- set turn.text = m['content'] -%}
{%- else -%}{%- for part in m['content'] -%}
{%- if part['type'] in ('image', 'video') -%}{%- set turn.text = turn.text + '<' + part['type'] + '>' -%}
{%- elif part['type'] == 'text' -%}{%- set turn.text = turn.text + part['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': m['role'], 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Prepended to a language model's own chat template: joins parts to one string and drops other types."""

FLATTEN_PARTS = FLATTEN_CONTENT.replace("'content': turn.text", "'content': [{'type': 'text', 'text': turn.text}]")
"""The same for a template that accepts only lists of parts."""


def image_grid(config: Any) -> ImageGrid:
    """How a VLM encodes images, from its configuration. Raises InputError for an unknown value."""
    named = getattr(config, "image_grid", "unires")
    for grid in get_args(ImageGrid):
        if grid == named:
            return grid
    raise InputError(f"config.json has image_grid {named!r}", fix=f"write one of {', '.join(get_args(ImageGrid))}")


def image_rule(config: Any) -> Literal["code", "paper"]:
    """The UniRes rule (`lvctx.models.unires`) of a VLM, from its configuration."""
    return "paper" if getattr(config, "image_grid_rule", "code") == "paper" else "code"


def tokens_per_frame(config: Any) -> int:
    """Language-model tokens of one frame or grid, from a LlavaOnevision configuration: 144 for CLIP ViT-L/14-336."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return math.ceil(side / 2) ** 2


def vlm_config(text: Any, vision: Any, tokenizer: Any) -> Any:
    """The LlavaOnevisionConfig of a language model, a tower and a tokenizer that has the placeholders."""
    from transformers import LlavaOnevisionConfig

    clip, side = vision.model_type.startswith("clip"), vision.image_size
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        # CLIP: second-last layer without CLS, as in LLaVA and LongVA. SigLIP: last layer, no CLS to drop.
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        image_grid="unires",  # a checkpoint of others has no such key: its images are encoded by its own processor
        image_grid_pinpoints=[[side * h, side * w] for h in range(1, 7) for w in range(1, 7)],
    )


def assemble(lm: Any, tower: Any, tokenizer: Any, *, where: Path, seed: int) -> Any:
    """Build a LlavaOnevision model from a language model and a tower, with a fresh projector drawn from `seed`.

    Adds the tokens `<image>` and `<video>` to `tokenizer` and grows the embedding if it has no rows for them;
    `image_newline` becomes the embedding of "\\n". `where` names the language model in errors.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    add_visual_tokens(tokenizer, where)
    grow_embedding(lm, len(tokenizer))
    config = vlm_config(lm.config, tower.config, tokenizer)
    with torch.device("meta"):
        vlm = LlavaOnevisionForConditionalGeneration(config)
    vlm.model.language_model = lm.model
    vlm.lm_head = lm.lm_head
    vlm.model.vision_tower = tower
    device = device_of(lm)
    projector = vlm.model.multi_modal_projector.to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed)
    for linear in (projector.linear_1, projector.linear_2):
        bound = 1 / math.sqrt(linear.in_features)  # torch.nn.Linear's own initialisation, drawn from a seeded generator
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    projector.to(device, lm.dtype)
    vlm.model.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size, dtype=lm.dtype, device=device))
    vlm.generation_config = lm.generation_config
    set_newline(vlm, tokenizer)
    return vlm.eval()


def add_visual_tokens(tokenizer: Any, where: Path) -> None:
    """Add `<image>` and `<video>` to a language model's tokenizer. Raises InputError if it has no chat template."""
    if tokenizer.chat_template is None:
        raise InputError("no chat template", where=where, fix="use an instruct model")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})


def grow_embedding(lm: Any, tokens: int) -> None:
    """Grow the embedding (and the head) to `tokens` rows, padded to a multiple of 64, if it has fewer.

    New rows are the mean of the old ones: their logits are average, so greedy decoding never selects a placeholder.
    """
    old = lm.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    rows, grown = -(-tokens // 64) * 64, dict[nn.Parameter, nn.Parameter]()
    for module, size in ((lm.get_input_embeddings(), "num_embeddings"), (lm.lm_head, "out_features")):
        for name, parameter in module.named_parameters():  # the head may have a bias, and share its weight
            if parameter not in grown:
                grown[parameter] = grow_rows(parameter, rows)
            setattr(module, name, grown[parameter])
        setattr(module, size, rows)
    lm.config.vocab_size = rows


def newline_id(tokenizer: Any) -> int:
    """The token of "\\n". Raises InputError if it is not a single token of this tokenizer."""
    ids = tokenizer.encode("\n", add_special_tokens=False)
    if len(ids) != 1:
        raise InputError('"\\n" is not one token of this tokenizer', where=tokenizer.name_or_path)
    return int(ids[0])


def set_newline(vlm: Any, tokenizer: Any) -> None:
    """Set `image_newline` to the language model's embedding of "\\n", the token that LongVA uses."""
    token = newline_id(tokenizer)
    with torch.no_grad():
        vlm.model.image_newline.copy_(read_rows(vlm.get_input_embeddings().weight, token, token + 1)[0])


def frame_features(vlm: Any, pixels_F3SS: Tensor) -> Tensor:
    """Tower features (F, P, D) of preprocessed frames, from the layer that the configuration selects."""
    states = vlm.model.vision_tower(pixels_F3SS, output_hidden_states=True).hidden_states
    features = states[vlm.config.vision_feature_layer]
    return features[:, 1:] if vlm.config.vision_feature_select_strategy == "default" else features


def embed_frames(vlm: Any, features_FPD: Tensor, grid_F2: Tensor | None = None) -> Tensor:
    """Language-model embeddings (tokens, E) of tower features: projector, then pool, raster order, frame by frame.

    The pool is 2x2, or an average that gives each frame its `grid_F2` of rows and columns (hybrid resolution).
    """
    side = math.isqrt(features_FPD.shape[1])
    linear = vlm.model.multi_modal_projector.linear_1
    parameter = linear.weight
    if features_FPD.shape[1:] != (side * side, parameter.shape[1]):
        raise InputError(
            f"features of shape {tuple(features_FPD.shape[1:])} per frame do not fit a projector with input "
            f"{parameter.shape[1]} channels",
            fix="encode the video with this model's own tower",
        )
    projected = vlm.model.multi_modal_projector(features_FPD.to(device_of(linear), parameter.dtype))
    if grid_F2 is None:
        return vlm.model.apply_pooling(projected).flatten(0, 1)
    frames: list[Tensor] = [projected] * len(projected)
    for rows, columns in {(int(r), int(c)) for r, c in grid_F2}:
        if side % rows or side % columns:
            raise InputError(f"{side} x {side} features cannot be pooled to {rows} x {columns}")
        chosen = [i for i, grid in enumerate(grid_F2.tolist()) if grid == [rows, columns]]
        map_FEHW = projected[chosen].transpose(1, 2).unflatten(2, (side, side))
        pooled = nn.functional.avg_pool2d(map_FEHW, (side // rows, side // columns)).flatten(2).transpose(1, 2)
        for i, frame in zip(chosen, pooled, strict=True):
            frames[i] = frame
    return torch.cat(frames)


def newline_embedding(vlm: Any) -> Tensor:
    """The embedding (1, E) that closes a block of frames."""
    return vlm.model.image_newline[None]


def chat_ids(tokenizer: Any, *turns: str, mark: str = VIDEO_TOKEN) -> tuple[list[int], list[int]]:
    """Token ids before and after the visual block of a chat that ends before the answer.

    `turns` are the user's, the reply, the user's next, ...; `mark` is the token of the block. The prompt ends as in
    training, with an empty `<think>` block if the template writes one.
    """
    chat = chat_encoder(tokenizer).prompt(_messages(turns, mark))
    return chat.ids[: chat.visual[0]], chat.ids[chat.visual[0] + 1 :]


def answer_ids(
    tokenizer: Any, question: str, answer: str, mark: str = VIDEO_TOKEN
) -> tuple[list[int], list[int], list[int]]:
    """`chat_ids` of a question, and the ids of its answer, as in a training sequence.

    For a chat template that training would refuse, it is the plain prompt, and the answer encoded separately.
    """
    try:
        chat = chat_encoder(tokenizer).encode(_messages((question, answer), mark), generation_marks=False)
    except InputError:
        return *chat_ids(tokenizer, question, mark=mark), list(tokenizer(answer, add_special_tokens=False).input_ids)
    at, ids, words = chat.visual[0], chat.ids, chat.answers[-1]
    return ids[:at], ids[at + 1 : words.first], ids[words.first : words.end]


def _messages(turns: Sequence[str], mark: str) -> list[dict[str, Any]]:
    first, *rest = turns
    contents = [(Visual(mark), first), *rest]
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def save_vlm(
    vlm: Any,
    tokenizer: Any,
    tower_dir: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    gather: Gather = Tensor.detach,
) -> None:
    """Write the files that stock transformers needs: weights, tokenizer, chat template with parts, and processor files.

    `tower_dir` is where the tower's preprocessor_config.json is. `dtype` and `gather` are those of `write_model`.
    """
    kind = vlm.model.image_newline.dtype
    newline = gather(vlm.get_input_embeddings().weight)[newline_id(tokenizer)].to(kind, copy=True)
    flatten_content(tokenizer)

    def with_newline(tensor: Tensor) -> Tensor:
        return newline if tensor is vlm.model.image_newline else gather(tensor)

    save_model(vlm, tokenizer, out, dtype=dtype, gather=with_newline)
    write_processors(vlm.config, read_json(tower_dir / PIXELS_FILE), out)
    write_vision_section(vlm.config, out)


def flatten_content(tokenizer: Any) -> None:
    """Make the chat template accept messages in parts, as processors send them."""
    template = text_template(tokenizer.get_chat_template())
    flatten = FLATTEN_PARTS if ChatEncoder(tokenizer, template).wants_parts else FLATTEN_CONTENT
    tokenizer.chat_template = flatten + template


def text_template(template: str) -> str:
    """A VLM's chat template without the prefix of `flatten_content`: its language model's."""
    return template.removeprefix(FLATTEN_CONTENT).removeprefix(FLATTEN_PARTS)


PIXELS_FILE = "preprocessor_config.json"
VLM_FILES = ("processor_config.json", "video_preprocessor_config.json")
PIXEL_OPTIONS = ("do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std", "resample")
"""Keys that a VLM copies from its tower's `PIXELS_FILE`."""


def write_processors(config: Any, pixels: Mapping[str, Any], out: Path) -> None:
    """Write the processors' files of a VLM; `pixels` is the content of its tower's `PIXELS_FILE`."""
    vision = config.vision_config
    square = {"height": vision.image_size, "width": vision.image_size}
    kept = {key: pixels[key] for key in PIXEL_OPTIONS if key in pixels} | {"do_resize": True}
    drop_cls = config.vision_feature_select_strategy == "default"
    files = {
        PIXELS_FILE: {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": config.image_grid_pinpoints,
            **kept,
            "size": square,
        },
        # A frame's short side is resized and its centre cropped, as in `encode-video`.
        VLM_FILES[1]: {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            **kept,
            "size": {"shortest_edge": vision.image_size},
            "do_center_crop": True,
            "crop_size": square,
        },
        VLM_FILES[0]: {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2 + drop_cls,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_token": IMAGE_TOKEN,
            "video_token": VIDEO_TOKEN,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        },
    }
    for name, content in files.items():
        write_json(out / name, content)
