"""Benchmarks: `python -m benchmarks.NAME` prints its figures, the last line as one JSON object."""
