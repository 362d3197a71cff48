"""Tables of subcommands: each row names the module that is imported once its command is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

from decoupled_pp.core.errors import UsageError


class Subcommand(NamedTuple):
    """One row.

    Attributes:
        name: The word on the command line.
        help: One line for the help of the command above it.
        module: Module whose `add_arguments(parser)` adds its arguments, and sets `run` to a function that takes the
            parsed arguments and returns the exit code.
    """

    name: str
    help: str
    module: str


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with a command line as a UsageError, like any other bad input."""

    def __init__(self, *, words: Collection[str] | None = None, **options: Any) -> None:
        """Creates a parser.

        Args:
            words: The command line. Only subcommands among its words are imported, because most of them import torch,
                which takes seconds. None: all are imported.
            **options: For `argparse.ArgumentParser`.
        """
        super().__init__(**options)
        self._words = words

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses a command line; raises UsageError if it is wrong."""
        for word in words:
            if word.startswith("-") and word.endswith("=--"):  # argparse takes the value for its own mark, and drops it
                self.error(f"{word}: an option cannot have the value --")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help", code="bad-command-line")

    def add_table(self, table: Sequence[Subcommand], metavar: str) -> None:
        """Adds a required subcommand, one of the table's rows."""
        commands = self.add_subparsers(required=True, metavar=metavar)
        for row in table:
            parser = commands.add_parser(row.name, help=row.help, words=self._words)
            if self._words is None or row.name in self._words:
                importlib.import_module(row.module).add_arguments(parser)
