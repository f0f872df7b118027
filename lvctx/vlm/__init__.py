"""Families of vision-language models: how each encodes images and videos for its language model."""
