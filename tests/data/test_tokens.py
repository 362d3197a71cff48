"""Windows over text."""

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.splits import random_split
from decoupled_pp.data.tokens import TokenWindows
from kit import refused


@pytest.mark.parametrize("length", [6, 9, 10, 11, 12, 50, 53, 1000])
def test_windows_of_an_epoch_do_not_overlap_stay_inside_and_predict_the_next_token(length):
    context = 5
    windows = TokenWindows(torch.arange(length, dtype=torch.int32), context, seed=4, part="training")
    offsets = set()
    for epoch in range(60):
        x, y = windows.take(torch.arange(len(windows)), epoch)
        assert x.dtype == y.dtype == torch.int64 and x.shape == (len(windows), context)
        assert torch.equal(y, x + 1)
        used = x.flatten()
        assert torch.equal(used, torch.arange(used[0], used[0] + len(used))), "neighbours, each token once"
        assert int(y.max()) < length
        offsets.add(int(used[0]))
    if length >= 2 * context:
        assert offsets == set(range(context)), "every offset is drawn"
        assert length - context * len(windows) < 2 * context, "nothing more than the offsets' room is wasted"


def test_validation_windows_cover_all_but_a_partial_window_in_order():
    windows = TokenWindows(torch.arange(53), 5, seed=None, part="validation")
    x, _ = windows.take(torch.arange(len(windows)), None)
    assert torch.equal(x.flatten(), torch.arange(50))


def test_a_text_shorter_than_a_sample_is_refused():
    with refused("too-little-data", UsageError, "training text has 5 tokens"):
        TokenWindows(torch.arange(5), 5, seed=0, part="training")


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 100])
def test_a_random_split_is_a_partition_with_something_in_both_parts(count, fraction):
    train, held = random_split(count, fraction, seed=0)
    assert train and held and sorted(train + held) == list(range(count))
    assert count < 100 or len(held) == min(max(round(fraction * count), 1), 99)
