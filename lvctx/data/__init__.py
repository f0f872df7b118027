"""Documents, conversations, and packing them into rows."""
