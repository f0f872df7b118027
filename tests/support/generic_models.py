"""Tiny random vision-language models of many classes, each with the class's own processor, saved as checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HIDDEN, PATCH, SIDE = 64, 8, 32
"""Width of the language model; pixels of a patch and of an image: 16 patches."""
ENDS = (("begin", "start"), ("end", "end"))
"""What GLM's tokens and its configuration call the ends of an image or a video."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE\n{% elif p['type'] == 'video' %}VIDEO\n{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*special: str, image: str = "<image>", video: str = "<video>", **named: str) -> Any:
    """Bytes, ChatML, and these special tokens; `named` are attributes such as `image_token`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ċ", "Ċ"), ("Ċ", "W")]  # some run over the borders of what is put together
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|pad|>", extra_special_tokens=named
    )
    tokens = ["<|im_start|>", "<|im_end|>", "<|pad|>", image, video, *special, *named.values()]
    fast.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(tokens))})
    fast.chat_template = CHATML.replace("IMAGE", image).replace("VIDEO", video)
    return fast


def metaspace_tokenizer(scheme: str) -> Any:
    """Characters and a few words, a space being part of the word behind it, as SentencePiece has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = ["▁", "\n", ":", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("t", "h"), ("\n", "t"), ("▁", "U")]
    words = ["<unk>", "<s>", "</s>", *characters, *dict.fromkeys("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def llama(tok: Any, kind: str = "llama", **more: Any) -> dict[str, Any]:
    """A language model's configuration."""
    return {
        "model_type": kind,
        "vocab_size": len(tok) + 3,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "eos_token_id": tok.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tok.pad_token_id,
        **more,
    }


def vision(kind: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    """A vision tower's configuration."""
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


SQUARE = {"height": SIDE, "width": SIDE}
CLIP_PIXELS = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}


def _llava() -> tuple[dict[str, Any], Any]:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = tokenizer()
    config = {"text_config": llama(tok), "vision_config": vision(), "image_token_index": _id(tok, "<image>")}
    pixels = CLIPImageProcessorPil(**CLIP_PIXELS)
    named = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaProcessor(pixels, tok, chat_template=tok.chat_template, **named)


def _vipllava() -> tuple[dict[str, Any], Any]:
    config, processor = _llava()
    return {**config, "vision_feature_layers": [-2, -1], "vision_feature_layer": [-2, -1]}, processor


def _llava_next() -> tuple[dict[str, Any], Any]:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tok = tokenizer()
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = {
        "text_config": llama(tok),
        "vision_config": vision(),
        "image_token_index": _id(tok, "<image>"),
        "image_grid_pinpoints": pinpoints,
    }
    pixels = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **CLIP_PIXELS)
    named = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaNextProcessor(pixels, tok, chat_template=tok.chat_template, **named)


def _llava_next_video() -> tuple[dict[str, Any], Any]:
    from transformers import LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    config, stock = _llava_next()
    config["video_token_index"] = _id(stock.tokenizer, "<video>")
    frames = LlavaNextVideoVideoProcessor(**CLIP_PIXELS)
    named = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaNextVideoProcessor(
        video_processor=frames,
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        chat_template=stock.chat_template,
        **named,
    )


def _llava_onevision() -> tuple[dict[str, Any], Any]:
    """As released: AnyRes with up to 9 grids, which larger images exceed and are interpolated."""
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tok = tokenizer()
    pinpoints = [[SIDE * down, SIDE * across] for down in range(1, 5) for across in range(1, 5)]
    config = {
        "text_config": llama(tok, "qwen2"),
        "vision_config": vision("siglip_vision_model", vision_use_head=False),
        "image_token_id": _id(tok, "<image>"),
        "video_token_id": _id(tok, "<video>"),
        "image_grid_pinpoints": pinpoints,
        "vision_aspect_ratio": "anyres_max_9",
    }
    pixels = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints)
    return config, LlavaOnevisionProcessor(
        pixels,
        tok,
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=tok.chat_template,
    )


def _video_llava() -> tuple[dict[str, Any], Any]:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    tok = tokenizer()
    config = {
        "text_config": llama(tok),
        "vision_config": vision(),
        "image_token_index": _id(tok, "<image>"),
        "video_token_index": _id(tok, "<video>"),
    }
    pixels = VideoLlavaImageProcessor(**CLIP_PIXELS), VideoLlavaVideoProcessor(**CLIP_PIXELS)
    return config, VideoLlavaProcessor(*pixels, tok, patch_size=PATCH, chat_template=tok.chat_template)


def _internvl() -> tuple[dict[str, Any], Any]:
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor, InternVLVideoProcessor

    tok = tokenizer(
        image="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = {
        "text_config": llama(tok, "qwen2"),
        "vision_config": vision("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        "image_token_id": _id(tok, "<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    pixels = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    return config, InternVLProcessor(
        pixels, tok, InternVLVideoProcessor(size=SQUARE), image_seq_length=4, chat_template=tok.chat_template
    )


def _idefics3(kind: str = "idefics3") -> tuple[dict[str, Any], Any]:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    rows = [f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)]
    tok = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    config = {
        "text_config": llama(tok),
        "vision_config": vision(f"{kind}_vision"),
        "image_token_id": _id(tok, "<image>"),
        "scale_factor": 2,
        "pad_token_id": tok.pad_token_id,
    }
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return config, Idefics3Processor(
        Idefics3ImageProcessorPil(**sizes), tok, image_seq_len=4, chat_template=tok.chat_template
    )


def _smolvlm() -> tuple[dict[str, Any], Any]:
    from transformers import SmolVLMImageProcessorPil, SmolVLMProcessor, SmolVLMVideoProcessor

    config, stock = _idefics3("smolvlm")
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    sampling = {"max_frames": 64, "fps": 1, "video_size": {"longest_edge": 2 * SIDE}}
    return config, SmolVLMProcessor(
        SmolVLMImageProcessorPil(**sizes),
        stock.tokenizer,
        SmolVLMVideoProcessor(**sizes, video_sampling=sampling),
        image_seq_len=4,
        chat_template=stock.chat_template,
    )


def _aya_vision() -> tuple[dict[str, Any], Any]:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessorPil

    tiles = ("TILE", "TILE_GLOBAL", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tok = tokenizer(*tiles)
    config = {
        "text_config": llama(tok, "cohere2", sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
        "vision_config": vision("siglip_vision_model"),
        "image_token_index": _id(tok, "<|IMG_PATCH|>"),
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    }
    pixels = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    named = {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2}
    return config, AyaVisionProcessor(pixels, tok, chat_template=tok.chat_template, **named)


def _cohere2_vision() -> tuple[dict[str, Any], Any]:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    tok = tokenizer(
        image_token="<image>", boi_token="<|boi|>", eoi_token="<|eoi|>", img_line_break_token="<|line_break|>"
    )
    # As the processor counts them, a tile has patch_size ** 2 tokens.
    side = 8 * PATCH
    config = {
        "text_config": llama(tok, "cohere2", sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
        "vision_config": vision("siglip_vision_model", image_size=side, patch_size=PATCH),
        "image_token_id": _id(tok, "<image>"),
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    }
    pixels = Cohere2VisionImageProcessor(size={"height": side, "width": side}, patch_size=4, max_patches=2)
    return config, Cohere2VisionProcessor(pixels, tok, chat_template=tok.chat_template)


def _mistral3() -> tuple[dict[str, Any], Any]:
    from transformers import PixtralImageProcessorPil, PixtralProcessor

    tok = tokenizer("[IMG_BREAK]", "[IMG_END]", image="[IMG]")
    config = {
        "text_config": llama(tok, "mistral", sliding_window=None),
        "vision_config": vision("pixtral", image_size=2 * SIDE, head_dim=16),
        "image_token_index": _id(tok, "[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    pixels = PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH})
    return config, PixtralProcessor(
        pixels, tok, patch_size=PATCH, spatial_merge_size=2, image_token="[IMG]", chat_template=tok.chat_template
    )


def _perception_lm() -> tuple[dict[str, Any], Any]:
    from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

    tok = tokenizer(image_token="<image>", video_token="<video>")
    config = {
        "text_config": llama(tok),
        # The released models' tower is of timm; any that gives hidden states does.
        "vision_config": vision(model_args={"embed_dim": 32}),
        "image_token_id": _id(tok, "<image>"),
        "video_token_id": _id(tok, "<video>"),
        "vision_use_cls_token": True,
        "projector_pooling_ratio": 2,
    }
    pixels = PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=2)
    return config, PerceptionLMProcessor(
        video_processor=PerceptionLMVideoProcessor(size=SQUARE),
        image_processor=pixels,
        tokenizer=tok,
        patch_size=PATCH,
        pooling_ratio=2,
        chat_template=tok.chat_template,
    )


def _ovis2() -> tuple[dict[str, Any], Any]:
    from transformers import Ovis2ImageProcessorPil, Ovis2Processor

    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tok = tokenizer("<IMG_ATOM>", *indicators)
    config = {
        "text_config": llama(tok, "qwen2"),
        "vision_config": vision("ovis2_vision", vocab_size=24, num_visual_indicator_tokens=5, hidden_stride=2),
        "image_token_id": _id(tok, "<IMG_ATOM>"),
        "visual_indicator_token_ids": [_id(tok, token) for token in indicators],
        "vocab_size": len(tok) + 3,
        "hidden_size": HIDDEN,
    }
    pixels = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    return config, Ovis2Processor(pixels, tok, image_seq_length=4, chat_template=tok.chat_template)


def _gemma3() -> tuple[dict[str, Any], Any]:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    tok = tokenizer(
        image="<image_soft_token>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    tok.chat_template = CHATML.replace("IMAGE", "<start_of_image>").replace("VIDEO", "<video>")
    text = llama(tok, "gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    config = {
        "text_config": text,
        "vision_config": vision("siglip_vision_model"),
        "mm_tokens_per_image": 4,
        "image_token_id": _id(tok, "<image_soft_token>"),
        "boi_token_index": _id(tok, "<start_of_image>"),
        "eoi_token_index": _id(tok, "<end_of_image>"),
    }
    pixels = Gemma3ImageProcessorPil(size=SQUARE)
    return config, Gemma3Processor(pixels, tok, image_seq_length=4, chat_template=tok.chat_template)


def _qwen_vl(kind: str) -> tuple[dict[str, Any], Any]:
    """Qwen3.5: linear attention in one of two layers, times in text, M-RoPE."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tok = tokenizer("<|vision_start|>", "<|vision_end|>", image="<|image_pad|>", video="<|video_pad|>")
    block = "<|vision_start|>{}<|vision_end|>"
    tok.chat_template = CHATML.replace("IMAGE", block.format("<|image_pad|>")).replace(
        "VIDEO", block.format("<|video_pad|>")
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = llama(
        tok,
        f"{kind}_text",
        layer_types=["linear_attention", "full_attention"],
        rope_parameters={**rope, "partial_rotary_factor": 0.25},
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    config = {
        "text_config": text,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
        },
        "image_token_id": _id(tok, "<|image_pad|>"),
        "video_token_id": _id(tok, "<|video_pad|>"),
        "vision_start_token_id": _id(tok, "<|vision_start|>"),
        "vision_end_token_id": _id(tok, "<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    pixels = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 256, "longest_edge": 64 * 4096}
    return config, Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**pixels, size=size),
        tok,
        Qwen3VLVideoProcessor(**pixels, size=size),
        chat_template=tok.chat_template,
    )


def _qwen3_5() -> tuple[dict[str, Any], Any]:
    return _qwen_vl("qwen3_5")


def _glm4v() -> tuple[dict[str, Any], Any]:
    from transformers import Glm4vImageProcessorPil, Glm4vProcessor, Glm4vVideoProcessor

    names = {f"{kind}_{end}_token": f"<|{begin}_of_{kind}|>" for kind in ("image", "video") for begin, end in ENDS}
    tok = tokenizer(*names.values(), image="<|image|>", video="<|video|>")
    blocks = [f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>" for kind in ("image", "video")]
    tok.chat_template = CHATML.replace("IMAGE", blocks[0]).replace("VIDEO", blocks[1])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}
    config = {
        "text_config": llama(tok, "glm4v_text", rope_parameters=rope),
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "out_hidden_size": HIDDEN,
        },
        "image_token_id": _id(tok, "<|image|>"),
        "video_token_id": _id(tok, "<|video|>"),
        **{f"{name}_id": _id(tok, token) for name, token in names.items()},
    }
    pixels = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 256, "longest_edge": 64 * 4096}
    return config, Glm4vProcessor(
        Glm4vImageProcessorPil(**pixels, size=size),
        tok,
        Glm4vVideoProcessor(**pixels, size=size),
        chat_template=tok.chat_template,
    )


def _paligemma() -> tuple[dict[str, Any], Any]:
    """Its processor adds a start token after the last image, and a line's end after everything."""
    from transformers import PaliGemmaProcessor, SiglipImageProcessorPil

    tok = tokenizer("<bos>", image_token="<image>")
    tok.bos_token = "<bos>"
    tok.chat_template = "{% for p in messages[0]['content'] %}" + (
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    )
    pixels = SiglipImageProcessorPil(size=SQUARE)
    pixels.image_seq_length = 16
    processor = PaliGemmaProcessor(pixels, tok, chat_template=tok.chat_template)
    config = {
        "text_config": llama(processor.tokenizer, "gemma"),
        "vision_config": vision("siglip_vision_model", projection_dim=HIDDEN, vision_use_head=False),
        "image_token_index": _id(processor.tokenizer, "<image>"),
        "projection_dim": HIDDEN,
    }
    return config, processor


def _idefics2() -> tuple[dict[str, Any], Any]:
    """Its processor merges the delimiters of images beside each other, and looks at the letter that follows one."""
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor

    tok = tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    tok.chat_template = CHATML.replace("IMAGE\n", "<image>")
    pixels = Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 2 * SIDE})
    config = {
        "text_config": llama(tok, "mistral", sliding_window=None),
        "vision_config": vision("idefics2_vision"),
        "perceiver_config": {
            "hidden_size": HIDDEN,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        "image_token_id": _id(tok, "<image>"),
    }
    return config, Idefics2Processor(pixels, tok, image_seq_len=4, chat_template=tok.chat_template)


KINDS: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
    "llava": _llava,
    "vipllava": _vipllava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "video_llava": _video_llava,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "mistral3": _mistral3,
    "perception_lm": _perception_lm,
    "ovis2": _ovis2,
}
"""Classes whose prefixes are shared."""
FORWARD: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
    "gemma3": _gemma3,
    "qwen3_5": _qwen3_5,
    "glm4v": _glm4v,
    "paligemma": _paligemma,
    "idefics2": _idefics2,
}
"""Classes that run by their own forward."""
STOCK_IMAGES: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {"llava_onevision": _llava_onevision}
"""Classes with a family of their own whose images are encoded by the stock processor."""


def _id(tok: Any, token: str) -> int:
    return int(tok.convert_tokens_to_ids(token))


def save(kind: str, out: Path) -> Path:
    """A checkpoint of this class; weights are larger than a fresh model's, so that its replies differ."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields, processor = {**KINDS, **FORWARD, **STOCK_IMAGES}[kind]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out
