"""Measured claims: one script a claim, JSON lines out. Run as `python -m benchmarks.NAME`."""
