"""Running a model: shared prefixes, a KV cache, and replies about images and video."""
