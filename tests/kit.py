"""What tests share: an expected fault by its code, whose text is held by one golden file."""

import json
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from decoupled_pp.commands.main import build_parser
from decoupled_pp.core.errors import UsageError

TEXTS = Path(__file__).parent / "fault_texts.json"
"""Code of a fault -> the texts that tests have seen with it, paths and measured numbers left out."""

SEEN = {}
"""The same, of this session; `pytest --update-texts` writes it into the file."""


@contextmanager
def refused(code, kind=UsageError, *parts):
    """The block raises an error of this code; its text is in the golden file.

    Args:
        code: Of the error.
        kind: Its class.
        *parts: What the text must contain, such as the value that this test gave.

    Yields:
        What `pytest.raises` yields.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    check_text(code, str(caught.value), *parts)


def run_dpp(*words):
    """Run a `dpp` command in this process as its front end does, but let its faults through; returns the exit code."""
    chosen = build_parser(words).parse_args(words)
    return chosen.run(chosen)


def check_text(code, text, *parts):
    """Hold a fault's text to the golden file."""
    assert "\n" not in text, "a fault is one line"
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    SEEN.setdefault(code, set()).add(_normal(text))


def _normal(text):
    """The text without what differs from machine to machine and from run to run."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}[^\s'\",;:]*", "PATH", text)
    return re.sub(r"\d+\.\d+", "#.#", text)


def written_texts():
    """What the golden file holds."""
    return {code: set(texts) for code, texts in json.loads(TEXTS.read_text()).items()} if TEXTS.exists() else {}


def write_texts(seen):
    """Add to the golden file; texts of codes that were seen are replaced."""
    kept = {code: sorted(texts) for code, texts in sorted((written_texts() | seen).items())}
    TEXTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
