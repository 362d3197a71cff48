"""The `dpp` command: one file or folder for each of its subcommands."""
