"""Benchmarks: what training and serving cost."""
