"""`python -m decoupled_pp` is `dpp`."""

from decoupled_pp.commands.main import main

main()
