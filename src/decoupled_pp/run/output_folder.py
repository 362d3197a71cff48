"""Refuses, makes or clears the folder that a command writes into; for runs, comparisons and sweeps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from yaml import YAMLError

from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.in_progress import LOCK_FILE
from decoupled_pp.settings.yaml_text import read_yaml


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """The folder of a command's results."""

    path: Path
    noun: str  # name of such a folder in messages: "run folder"
    marker: str  # a file that stands in every such folder
    is_one: Callable[[Path], bool]  # looks into the marker: no other folder is overwritten
    written: Callable[[Path], Iterable[Path]]  # all that such a command may have written there: nothing else is deleted
    if_it_exists: str
    elsewhere: str
    key: str | None = None  # the setting that does so, if there is one

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Decide whether the command may use the folder; only looks."""
        if resume and overwrite:
            raise UsageError("--resume and --overwrite contradict each other; give one", code="resume-and-overwrite")
        with self.named():
            # A lock alone is of a run that was refused or killed before it wrote anything.
            if self.path.exists() and not all(path.name.startswith(LOCK_FILE) for path in self.path.iterdir()):
                self._check_content(resume, overwrite)
            nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise self._unwritable(f"{nearest} is not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._unwritable(f"no permission to write {nearest}")

    def _check_content(self, resume: bool, overwrite: bool) -> None:
        if not (resume or overwrite):
            raise UsageError(f"{self.noun} {self.path} exists; {self.if_it_exists}", code="output-exists")
        if not self.is_one(self.path):
            refused = "resumed" if resume else "overwritten"
            raise UsageError(
                f"{self.path} holds no {self.marker} of a {self.noun}, and is not {refused}; {self.elsewhere}",
                code="not-an-output-folder",
            )

    def make(self, *, empty: bool) -> None:
        """Make the folder, after `check`."""
        with self.named():
            if empty:
                _delete(self.written(self.path))
            self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Turn what the file system refuses inside the block into one line that names the folder."""
        try:
            yield
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def _unwritable(self, reason: str) -> UsageError:
        text = f"cannot write the {self.noun} {self.path}: {reason}; {self.elsewhere}"
        return UsageError(text, code="output-not-writable", key=self.key)


def _delete(paths: Iterable[Path]) -> None:
    """Delete files and folders, and the folders around them that this leaves empty."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a user's own files are in it
            path.parent.rmdir()


def mapping_in(file: Path, keys: Iterable[str]) -> bool:
    """Return whether a YAML file holds a mapping with all these keys."""
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError, UsageError):
        return False
    return isinstance(content, dict) and set(keys) <= content.keys()
