"""Arguments that several subcommands share, and how their values are checked."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.paths import expanded


def add_overrides(parser: argparse._ActionsContainer, help: str = "override a setting") -> None:
    """Adds `--set KEY=VALUE`, which may be given several times."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def strategies_of(text: str, known: Sequence[str]) -> list[str]:
    """Reads the comma-separated value of `--strategies`; raises UsageError if one of them is not known."""
    kinds = [word.strip() for word in text.split(",")]
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                f"--strategies: {kind!r} is unknown; choose from {', '.join(known)}",
                code="unknown-strategy",
                key="strategy",
            )
    return kinds


def numbers_of(option: str, text: str, least: float, example: str, *, whole: bool = False) -> list[float]:
    """Reads comma-separated finite numbers of at least `least`; raises UsageError, with an example, if they are not."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if all(least <= number < math.inf and (number.is_integer() or not whole) for number in numbers):
        return numbers
    raise UsageError(
        f"{option} {text} must be comma-separated {'whole ' if whole else ''}numbers of at least {least:g}, such as "
        f"{example}",
        code="option-unreadable",
    )


def check_at_least(chosen: argparse.Namespace, **least: float) -> None:
    """Raises UsageError if an option is below its bound: `check_at_least(chosen, micro_batches=1)`."""
    for name, bound in least.items():
        value = getattr(chosen, name)
        if not value >= bound:  # so that NaN is refused, too
            raise UsageError(f"{flag(name)} {value:g} must be at least {bound:g}", code="option-out-of-range")


def flag(name: str) -> str:
    """Returns an option as it is typed: `--micro-batches` of `micro_batches`."""
    return "--" + name.replace("_", "-")


def output_file(option: str, text: str | None) -> Path | None:
    """Returns the file that an option names; raises UsageError, before the work begins, if it cannot be written."""
    if text is None:
        return None
    path = Path(expanded(text))
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder; name a file in it")
        if not path.parent.is_dir():
            raise NotADirectoryError(0, f"there is no folder {path.parent}; make it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(0, "no permission to write it; name another file")
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}", code="no-such-folder") from None
    return path
