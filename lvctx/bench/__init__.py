"""Benchmarks: samples, prompts, scores and reports, one file each."""
