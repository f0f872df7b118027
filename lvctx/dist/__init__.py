"""The only importer of torch.distributed."""
