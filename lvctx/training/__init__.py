"""The trainings and their common life cycle."""
