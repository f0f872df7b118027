"""Qwen-VL models that read video files here.

Their prompts come with position ids of our own (`lvctx.vision.reel`), in generation too: stock generation asks the
model for positions, and transformers 5.3 and later give it wrong ones after a video.
"""

TYPES = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose videos are items of grids."""

TIMED = ("qwen3_vl",)
"""Model types that write a time in text before each grid, which then is an item of its own."""
