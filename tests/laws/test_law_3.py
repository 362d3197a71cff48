"""Law 3: timing never changes the result; random sleeps in any stage or link leave every parameter bit-identical."""

import functools
import os
import random
import time
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from cases import CASES, train

from decoupled_pp.links import InProcessLink, ReceivingEnd, SendingEnd
from decoupled_pp.links.messages import MessageReceiver, MessageSender
from decoupled_pp.pipeline.feed import Feed
from decoupled_pp.pipeline.rules.local import Local
from decoupled_pp.pipeline.stage import Stage
from kit import differences, merged, states
from ranks import launch, values

STEPS = 8

SHAKEN = [
    (Stage, "train"),
    (Local, "learn"),
    (MessageSender, "send"),
    (MessageReceiver, "receive"),
    (Feed, "receive"),
    (InProcessLink, "send"),
    (InProcessLink, "receive"),
    (SendingEnd, "send"),
    (ReceivingEnd, "receive"),
]
"""Every place where a stage or a link can be slow."""


@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_delays_change_nothing(case, tmp_path):
    undisturbed = train(case, 3, STEPS)
    delays = []
    for seed, capacity in ((1, 4), (2, 4), (3, 1)):  # the rank that is slow: 1, 2, 0
        results = values(launch(_shaken_train, case, seed, capacity, size=3, folder=tmp_path / str(seed)))
        assert differences(merged(own for own, _ in results), undisturbed) == []
        delays += [slept for _, slept in results]

    assert all(slept > 20 for slept in delays)  # the delays did happen, on every rank


def test_delays_in_one_process_change_nothing():
    assert differences(_shaken_train("gpt with dropout", 3, 2)[0], train("gpt with dropout", 3, STEPS)) == []


def test_the_random_stream_of_a_stage_is_its_own():
    """A stage's dropout does not depend on who else draws, or how often, in the same process."""
    alone, crowded = (CASES["gpt with dropout"].trainer(2) for _ in range(2))
    batches = CASES["gpt with dropout"].batches(4)
    alone.fit(batches, 4)

    def draws_between():
        for batch in batches:
            CASES["gpt with dropout"].batch(0)
            yield batch

    crowded.fit(draws_between, 4)

    assert differences(states(alone), states(crowded)) == []


def _shaken_train(case, seed, capacity):
    """Train with random delays everywhere, long ones on one rank; the states, and how many delays there were."""
    rank = int(os.environ.get("RANK", "0"))
    sleeper, longest = random.Random(seed * 100 + rank), 0.03 if rank == seed % 3 else 0.003
    count = [0]

    def slowed(method):
        @functools.wraps(method)
        def slow(*arguments, **options):
            count[0] += 1
            time.sleep(sleeper.random() ** 2 * longest)
            return method(*arguments, **options)

        return slow

    with ExitStack() as stack:
        for owner, name in SHAKEN:
            stack.enter_context(patch.object(owner, name, slowed(getattr(owner, name))))
        return train(case, 3, STEPS, capacity=capacity), count[0]
