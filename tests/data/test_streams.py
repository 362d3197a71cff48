"""Batches of samples that can only be read in order."""

from itertools import islice

import pytest
import torch

from decoupled_pp.data.streams import StreamedBatches, windows
from kit import refused


def pairs(epoch, count=10):
    return ((torch.tensor(100 * epoch + n), torch.tensor(n)) for n in range(count))


def test_training_drops_partial_batches_and_resumes_by_number():
    source = StreamedBatches(pairs, 4, endless=True)
    straight = [x.tolist() for x, _ in islice(source.batches(), 5)]
    assert straight == [[0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103], [104, 105, 106, 107], [200, 201, 202, 203]]
    assert [x.tolist() for x, _ in islice(source.batches(3), 2)] == straight[3:]


def test_validation_is_one_pass_with_its_partial_batch_and_small_sets_are_one_batch():
    assert [len(x) for x, _ in StreamedBatches(pairs, 4, endless=False).batches()] == [4, 4, 2]
    small = StreamedBatches(lambda epoch: pairs(epoch, 3), 4, endless=True)
    assert [len(x) for x, _ in islice(small.batches(), 3)] == [3, 3, 3]


def test_an_empty_stream_is_an_error_and_not_an_endless_loop():
    with refused("too-little-data"):
        next(StreamedBatches(lambda _: iter(()), 4, endless=True).batches())


@pytest.mark.parametrize("skip", [0, 1, 4, 9])
@pytest.mark.parametrize("lengths", [[50], [1] * 50, [7, 0, 13, 30]])
def test_windows_are_the_same_however_the_text_is_cut(lengths, skip):
    texts = torch.arange(50, dtype=torch.uint8).split(lengths)
    found = list(windows(texts, 5, skip))
    starts = range(skip, 45, 5)
    assert [x.tolist() for x, _ in found] == [list(range(at, at + 5)) for at in starts]
    assert all(torch.equal(y, x + 1) for x, y in found)
