"""Everything written to disk: schemas, the atomic store, manifests, provenance and append-only row logs."""
