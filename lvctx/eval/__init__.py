"""Evaluation: what models are asked, and what their replies are worth."""
