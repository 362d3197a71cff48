"""Makes a user's own list, DataLoader or generator function of (input, target) pairs a `BatchSource`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

from torch import Tensor

from decoupled_pp.core.arguments import expect_function
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, as_payload

Batches: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""An iterable of (input, target) pairs, or a function without arguments that returns a fresh one."""


class ListedBatches(BatchSource):
    """The batches of an iterable, which is iterated anew for every epoch.

    A number always means the same micro-batch only if the iterable yields the same every time: a shuffling DataLoader
    needs a seeded generator of its own. Resuming costs nothing for lists and tuples; other iterables are read up to the
    first wanted batch; a one-shot iterator goes on from where it stands.
    """

    def __init__(self, batches: Batches, endless: bool = False, first: int = 0) -> None:
        """Wrap `batches`: `endless` ones start over at their end; a one-shot iterator yields number `first` next."""
        self._batches = batches
        self._endless = endless
        self._one_shot = isinstance(batches, Iterator)
        self._first = first if self._one_shot else 0
        self._used = False

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on."""
        if isinstance(self._batches, Sequence):
            return self._listed(self._batches, start)
        return (as_batch(batch) for batch in islice(self._iterated(), start - self._first, None))

    def _listed(self, batches: Sequence[Any], start: int) -> Iterator[Batch]:
        if not batches:
            raise UsageError("the list of batches is empty; give at least one (input, target)", code="no-batches")
        for number in count(start) if self._endless else range(start, len(batches)):
            yield as_batch(batches[number % len(batches)])

    def _iterated(self) -> Iterator[Any]:
        while True:
            if self._one_shot and self._used:
                raise UsageError(
                    f"the {type(self._batches).__name__} of batches is exhausted: it can be read only once; "
                    "give a list, a DataLoader, or the generator function itself without calling it",
                    code="batches-exhausted",
                )
            self._used = True
            is_empty = True
            for batch in self._new_pass():
                is_empty = False
                yield batch
            if is_empty:  # an endless source would otherwise loop without ever yielding
                raise UsageError(
                    f"the {type(self._batches).__name__} of batches is empty; it must yield (input, target)",
                    code="no-batches",
                )
            if not self._endless:
                return

    def _new_pass(self) -> Iterable[Any]:
        if isinstance(self._batches, Iterable):
            return self._batches
        made = self._batches()
        if not isinstance(made, Iterable):
            raise UsageError(
                f"the function of batches returned {type(made).__name__}; return an iterable, or yield",
                code="not-batches",
            )
        return made


def as_source(batches: Batches | BatchSource, endless: bool = False, first: int = 0) -> BatchSource:
    """Make a `BatchSource` of a user's batches (see `ListedBatches`); a `BatchSource` is returned as it is."""
    if isinstance(batches, BatchSource):
        return batches
    if isinstance(batches, Tensor | str | dict) or not (isinstance(batches, Iterable) or callable(batches)):
        raise UsageError(
            f"batches: {type(batches).__name__} is not an iterable of (input, target); give a list, a DataLoader, a "
            "generator function or a BatchSource",
            code="not-batches",
        )
    if not isinstance(batches, Iterable):
        expect_function("batches", batches, 0, "a list, a DataLoader, a generator function or a BatchSource")
    return ListedBatches(batches, endless, first)


def as_batch(value: object) -> Batch:
    """Check one (input, target); lists, as DataLoader makes them, become tuples."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        size = f" with {len(value)} entries" if isinstance(value, tuple | list) else ""
        raise UsageError(
            f"a batch is of type {type(value).__name__}{size}, not a pair; yield (input, target)", code="bad-batch"
        )
    inputs, target = value
    return as_payload(inputs, "the input of a batch has", "bad-batch"), as_payload(
        target, "the target of a batch has", "bad-batch"
    )
