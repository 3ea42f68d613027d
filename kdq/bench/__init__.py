"""Benchmarks behind the numbers in the documentation: ``python -m kdq.bench``."""
