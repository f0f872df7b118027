"""Loading, saving and converting models."""
