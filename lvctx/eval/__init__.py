"""Evaluation: needle tests and benchmarks of long video."""
