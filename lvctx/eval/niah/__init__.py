"""Needle-in-a-haystack tests over text and video."""
