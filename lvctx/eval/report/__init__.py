"""One HTML page of results of any kind: collected into plain data, and shown by a page that needs nothing else."""
