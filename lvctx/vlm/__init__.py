"""Families of vision-language models: what an image or a video becomes for the language model of each."""
