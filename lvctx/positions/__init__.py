"""Position schemes: one file each, with `inv_freq(spec)` and `to_hf(spec)`."""
