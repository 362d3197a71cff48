"""`python -m decoupled_pp` is `dpp`."""

from decoupled_pp.cli import main

main()
