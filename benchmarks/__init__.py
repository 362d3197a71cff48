"""Benchmarks of this repository, which are not installed: `dpp bench` runs them in a checkout."""
