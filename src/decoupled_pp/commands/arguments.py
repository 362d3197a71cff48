"""Arguments that several subcommands share, and how their values are checked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from decoupled_pp.core.errors import UsageError


def add_overrides(parser: argparse._ActionsContainer, help: str = "override a setting") -> None:
    """Adds `--set KEY=VALUE`, which may be given several times."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def strategies_of(text: str, known: Sequence[str]) -> list[str]:
    """Reads the comma-separated value of `--strategies`.

    Raises:
        UsageError: One of them is not known.
    """
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
    """Reads comma-separated finite numbers.

    Args:
        option: The option, such as `--mbit`.
        text: Its value.
        least: Smallest number allowed.
        example: A value that could have been given.
        whole: True if only whole numbers are allowed.

    Raises:
        UsageError: It is no such list.
    """
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
    """Checks that options are not below their bounds, such as `check_at_least(chosen, micro_batches=1)`.

    Raises:
        UsageError: One of them is.
    """
    for name, bound in least.items():
        value = getattr(chosen, name)
        if value < bound:
            raise UsageError(f"{flag(name)} {value:g} must be at least {bound:g}", code="option-out-of-range")


def flag(name: str) -> str:
    """Returns an option as it is typed: `--micro-batches` of `micro_batches`."""
    return "--" + name.replace("_", "-")
