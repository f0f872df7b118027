"""What a command does: each stage composes the rooms below and knows nothing of the command line."""
