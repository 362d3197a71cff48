"""Suggests the known word that a misspelt one resembles."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like `word`, as the end of an error text; empty if none is like it."""
    by_lower = {one.lower(): one for one in known}  # adamw is AdamW, not Adam
    close = [by_lower[one] for one in difflib.get_close_matches(word.lower(), by_lower, n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""
