"""Benchmarks of long video, one file each, and their scorers."""
