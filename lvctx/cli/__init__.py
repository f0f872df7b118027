"""The command line: one file per command, which parses, calls one job and prints its rows."""
