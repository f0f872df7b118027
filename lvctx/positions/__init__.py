"""Position schemes: one file each, with `inv_freq(spec)` and `to_hf(spec)`; `spec.py` says what they share."""
