"""Benchmarks: one dataset, many recipes and seeds, and the table that comes of them."""
