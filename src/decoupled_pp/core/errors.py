"""The errors that a user reads, and how one rank tells the others why the run ends.

A text writes a setting as its key in the settings file between backticks: "lower `optimizer.lr`". Whoever shows the
error may translate the keys into the words that its user typed (`speak`): a script says `clip_norm`, a settings file
says `training.clip_norm`. Tests and tools compare `code`, which stays; texts may change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")


class ReportedError(Exception):
    """An error that is shown as one line, without a traceback.

    Attributes:
        code: Stable name of this kind of fault, such as `checkpoint-corrupt`.
        key: Key of the setting at fault in the settings file, such as `training.clip_norm`; None if it is no setting.
    """

    def __init__(self, text: str, *, code: str, key: str | None = None) -> None:
        self.text = one_line(text)
        super().__init__(self.text)
        self.code = code
        self.key = key
        self._names: Mapping[str, str] = {}

    def speak(self, names: Mapping[str, str]) -> None:
        """From now on, `str` shows these names in place of the keys of settings."""
        self._names = names

    def __str__(self) -> str:
        return _KEY.sub(lambda found: f"`{self._names.get(found[1], found[1])}`", self.text)


class UsageError(ReportedError, ValueError):
    """The user's input is at fault: one line that names the fault, the value and the remedy (exit code 2)."""


class TrainingError(ReportedError, RuntimeError):
    """Training cannot go on: a non-finite loss, a failed peer, a signal (one line, exit code 1)."""


class LinkError(TrainingError):
    """A link broke, or a bounded wait on it expired; the text says who waited for whom, for what, how long."""


def one_line(text: str) -> str:
    """Returns a text on one line; what a terminal would obey in place of showing it is written out."""
    line = " ".join(text.split())
    return (
        line
        if line.isprintable()
        else "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)
    )


def shortened(text: str, longest: int = 120) -> str:
    """Returns a text, cut to a length that a line can hold."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def text_of(error: BaseException) -> str:
    """Returns an exception's message, whatever it takes: user code may raise errors that cannot be printed."""
    try:
        return str(error)
    except Exception as unprintable:
        return f"(its text cannot be shown: {type(unprintable).__name__} in __str__)"


def shown(value: object) -> str:
    """Returns a value as Python writes it, shortened."""
    try:
        return shortened(repr(value))
    except Exception:  # more digits than Python prints, too deep, or whatever a class of the user's does
        return f"a value of type {type(value).__name__} that cannot be shown"


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its class if the message is empty."""
    return (text_of(error).strip() or type(error).__name__).split("\n", 1)[0]


def waited_too_long(who: str, what: str, waited: float, bound: float) -> LinkError:
    """Return the error of a wait whose bound is over: `who` waited for `what` (with its source), in seconds."""
    return LinkError(
        f"{who} waited {waited:.1f} s for {what}: the bound of {bound:g} s is over; raise `links.timeout_seconds` if "
        "the other side is only slow",
        code="wait-too-long",
        key="links.timeout_seconds",
    )


LAUNCHER_GONE = "the launcher is gone: its store does not answer"
"""Text of the fault on a rank whose launcher was killed: nobody else can say how to go on."""

STORE_SILENT = "the launcher cannot be reached: its host or the network to it is gone"
"""Text of the fault on a rank that gets no answer from the launcher's store, not even that it is gone."""


@dataclass(frozen=True)
class Fault:
    """The reason why a run ends early, as one rank tells it to all."""

    text: str
    rank: int  # the one that found it
    usage: bool  # True if the user's input is at fault (exit code 2) rather than the training (1)
    code: str

    @staticmethod
    def of(error: BaseException, rank: int) -> Fault:
        """Return the fault that an error of a rank is to all others; its text is in the words of no front end."""
        if isinstance(error, ReportedError):
            return Fault(error.text, rank, isinstance(error, UsageError), error.code)
        if isinstance(error, KeyboardInterrupt):
            return Fault(f"rank {rank} was interrupted", rank, False, "interrupted")
        return Fault(f"rank {rank}: {type(error).__name__}: {text_of(error)}", rank, False, "unexpected-error")


class PeerError(TrainingError):
    """This rank ends because another one reported a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text, code=fault.code)
        self.fault = fault
