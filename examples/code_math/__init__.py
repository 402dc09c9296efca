"""A tiny model that learns to write Python for the `python` tool, trained through verl on a CPU."""
