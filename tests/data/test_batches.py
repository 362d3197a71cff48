"""The promises of every batch stream, on samples that are their own index."""

from itertools import islice

import pytest
import torch

from decoupled_pp.data.batches import Samples, TrainingBatches, ValidationBatches
from decoupled_pp.data.seeds import Purpose, mixed_seed


class Numbers(Samples):
    """Sample i is the number i."""

    def __init__(self, count):
        self.count = count
        self.taken = 0

    def __len__(self):
        return self.count

    def take(self, indices, epoch):
        self.taken += 1
        return indices.clone(), indices * 10


def numbers(source, start, amount):
    return [batch[0].tolist() for batch in islice(source.batches(start), amount)]


def noisy(batch, random):
    return batch[0] + torch.rand(batch[0].shape, generator=random), batch[1]


@pytest.mark.parametrize("augmentation", [None, noisy])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 17, 23])
def test_a_batch_is_the_same_from_any_start_whatever_the_global_generator(start, augmentation):
    source = TrainingBatches(lambda: Numbers(23), 4, seed=7, augmentation=augmentation)
    straight = numbers(source, 0, 30)
    torch.rand(3)  # nothing may depend on the global generator
    assert numbers(source, start, 30 - start) == straight[start:]
    before = torch.get_rng_state()
    numbers(source, start, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order():
    source = TrainingBatches(lambda: Numbers(24), 4, seed=1)
    epochs = [[n for batch in numbers(source, epoch * 6, 6) for n in batch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_batch_is_augmented_differently():
    source = TrainingBatches(lambda: Numbers(8), 4, seed=1, augmentation=noisy)
    noise = [x - y / 10 for x, y in islice(source.batches(), 6)]  # three epochs of two batches; y tells the plain x
    assert len({tuple(one.tolist()) for one in noise}) == 6


def test_the_partial_batch_is_dropped_in_training_and_kept_in_validation():
    train = numbers(TrainingBatches(lambda: Numbers(10), 4, seed=0), 0, 6)
    assert [len(batch) for batch in train] == [4] * 6
    assert all(len(set(train[at] + train[at + 1])) == 8 for at in (0, 2, 4))
    assert numbers(ValidationBatches(lambda: Numbers(10), 4), 0, 9) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert numbers(ValidationBatches(lambda: Numbers(10), 4), 2, 9) == [[8, 9]]


def test_a_set_smaller_than_a_batch_is_one_batch_per_epoch():
    batches = numbers(TrainingBatches(lambda: Numbers(3), 8, seed=0), 0, 4)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]] * 4


def test_resuming_far_away_takes_only_what_it_yields():
    samples = Numbers(100)
    next(TrainingBatches(lambda: samples, 10, seed=0).batches(1_000_000))
    assert samples.taken == 1


def test_nothing_is_read_before_the_first_batch():
    def load():
        raise AssertionError("read too early")

    TrainingBatches(load, 4, seed=0).batches(5)
    ValidationBatches(load, 4).batches(0)


def test_random_streams_do_not_meet():
    seeds = {mixed_seed(s, p, n) & 0xFFFFFFFF for s in range(10) for p in Purpose for n in range(100)}
    assert len(seeds) == 10 * len(Purpose) * 100
