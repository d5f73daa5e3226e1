"""Benchmarks: one module per question, each runnable as ``python -m benchmarks.<name>``."""
