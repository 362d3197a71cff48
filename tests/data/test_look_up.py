"""Look-ups against following the table by hand, and the promises of a batch stream."""

from itertools import islice

import pytest
import torch

from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.data import open_data
from decoupled_pp.settings.sections import LookUpData


def opened(seed=3, **changes):
    return open_data(
        LookUpData(kind="look_up", **{"nodes": 6, "hops": 3, "questions": 2, "batch_size": 5} | changes), seed
    )


def test_answers_follow_the_table():
    inputs, targets = next(opened().train.batches())
    assert inputs.shape == targets.shape == (5, 6 + 3 * 2)
    for ids, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        table, asked = ids[:6], ids[6:]
        assert sorted(table) == list(range(6)) and answers[:6] == [IGNORED] * 6
        for place, answer in enumerate(answers[6:]):
            node = asked[place]
            for _ in range(place // 2 + 1):
                node = table[node]
            assert node == answer


def test_a_batch_is_the_same_from_any_start():
    straight = list(islice(opened().train.batches(), 6))
    torch.rand(3)  # nothing may depend on the global generator
    later = list(islice(opened().train.batches(4), 2))
    for (a, b), (c, d) in zip(straight[4:], later, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(straight[0][0], straight[1][0])
    assert not torch.equal(straight[0][0], next(opened(seed=4).train.batches())[0])


def test_held_out_samples_are_those_of_every_seed_and_none_of_training():
    held, other = (list(opened(seed=seed, validation_samples=12, nodes=9).validation.batches()) for seed in (0, 1))
    assert [len(inputs) for inputs, _ in held] == [5, 5, 5]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(held, other, strict=True))
    trained = {tuple(ids) for inputs, _ in islice(opened(nodes=9).train.batches(), 20) for ids in inputs.tolist()}
    assert trained.isdisjoint(tuple(ids) for inputs, _ in held for ids in inputs.tolist())


def test_more_questions_than_nodes_are_refused():
    with pytest.raises(ValueError, match=r"data\.questions"):
        LookUpData(kind="look_up", nodes=3, questions=4)
