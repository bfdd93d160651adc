"""Benchmarks of whole jobs: training, start, growth, failures; `python -m barepp.bench`."""
