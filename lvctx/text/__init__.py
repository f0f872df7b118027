"""Text: documents, packing and needles."""
