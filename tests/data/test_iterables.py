"""A user's own batches as a source."""

from itertools import islice

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import as_source
from decoupled_pp.data.iterables import as_batch
from kit import refused

PAIRS = [(torch.tensor([n]), torch.tensor([n + 100])) for n in range(5)]


def generate():
    yield from PAIRS


def loader():
    return DataLoader(TensorDataset(torch.arange(5), torch.arange(100, 105)), batch_size=1)


def numbers(batches):
    return [int(batch[0]) for batch in batches]


@pytest.mark.parametrize(
    "batches", [PAIRS, tuple(PAIRS), generate, loader()], ids=["list", "tuple", "function", "loader"]
)
@pytest.mark.parametrize("start", [0, 3, 5, 12])
def test_epochs_repeat_and_any_start_continues_the_same_sequence(batches, start):
    endless = as_source(batches, endless=True)
    assert numbers(islice(endless.batches(start), 8)) == [(start + n) % 5 for n in range(8)]
    once = as_source(batches)
    assert numbers(once.batches(start)) == list(range(start, 5))
    assert numbers(once.batches()) == list(range(5)), "a second pass is the same"


def test_a_source_is_returned_as_it_is():
    source = as_source(PAIRS)
    assert as_source(source) is source


def test_a_generator_can_be_read_once_and_then_names_the_remedy():
    endless = as_source(generate(), endless=True).batches()
    assert numbers(islice(endless, 5)) == list(range(5))
    with refused("batches-exhausted", UsageError, "generator"):
        next(endless)
    once = as_source(generate())
    assert numbers(once.batches(2)) == [2, 3, 4]
    with refused("batches-exhausted"):
        next(once.batches())


def test_an_iterator_is_read_on_from_where_it_stands():
    generator = generate()
    assert numbers(islice(generator, 2)) == [0, 1]
    assert numbers(as_source(generator, first=2).batches(2)) == [2, 3, 4]
    assert numbers(as_source(generate(), first=1).batches(3)) == [2, 3, 4]
    assert numbers(as_source(PAIRS, first=2).batches(2)) == [2, 3, 4]


@pytest.mark.parametrize("empty", [[], list, lambda: iter(())])
def test_nothing_to_yield_is_an_error_and_not_an_endless_loop(empty):
    with refused("no-batches", UsageError, "empty"):
        next(as_source(empty, endless=True).batches())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 2),
        (torch.zeros(1),),
        (torch.zeros(1),) * 3,
        {"x": 1},
        (torch.zeros(1), 3),
        ([], torch.zeros(1)),
        (numpy.zeros((2, 2)), torch.zeros(1)),
        (torch.zeros(1), numpy.zeros(2)),
    ],
)
def test_what_is_no_pair_of_tensors_is_refused(wrong):
    with refused("bad-batch"):
        next(as_source([wrong]).batches())


@pytest.mark.parametrize("wrong", [3, None, torch.zeros(4, 2), "abc", {"a": 1}])
def test_what_is_no_iterable_of_batches_is_refused(wrong):
    with refused("not-batches"):
        as_source(wrong)


def test_lists_of_tensors_inside_a_batch_become_tuples():
    a, b = torch.zeros(1), torch.ones(1)
    assert as_batch([[a, b], b]) == ((a, b), b)
