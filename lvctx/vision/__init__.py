"""Pixels: decoding, grids, towers and drawn pictures."""
