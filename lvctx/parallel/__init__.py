"""Ranks, sharding and ring attention; the only importer of torch.distributed."""
