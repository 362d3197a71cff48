"""Benchmarks of this repository that are not installed: `dpp bench wan` and `dpp bench gpu` in a checkout."""
