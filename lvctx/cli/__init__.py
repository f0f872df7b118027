"""The command line: one file per command, which parses, calls one stage function and emits rows."""
