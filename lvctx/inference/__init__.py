"""Running a model: shared prefixes, a KV cache, and replies about what it is shown."""
