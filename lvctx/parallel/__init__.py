"""Ranks, sharding, ring and Ulysses attention; the only importer of torch.distributed."""
