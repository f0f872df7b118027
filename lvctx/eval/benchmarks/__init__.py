"""Benchmarks of long video, one file each, and what their replies are worth."""
