"""Reading and sampling video."""
