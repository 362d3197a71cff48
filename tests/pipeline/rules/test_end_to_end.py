"""End-to-end steps between local ones: plain backpropagation while they last, over ranks and whatever the timing."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.stage import Stage
from kit import differences, ignore, refused, vector_batches, weights
from ranks import launch, values

B, WIDTH, CLASSES = 4, 6, 3
EVERY, STEPS = 2, 3
LOCAL = [0, 1, 5, 6, 10]
"""Optimizer steps that are local ones, of the first eleven."""


def batches(count):
    return vector_batches(count, B, WIDTH, CLASSES)


class Pair(nn.Module):
    """A tensor -> two, of which one is no float; so links carry back a gradient for the first alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return self.linear(hidden).tanh(), torch.arange(len(hidden))


class Join(nn.Module):
    """The two -> one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair):
        return self.linear(pair[0]).tanh() + pair[1][:, None]


def network():
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    return nn.Sequential(first, Pair(), Join(), nn.Linear(WIDTH, CLASSES))


def trainer(stages=4, **options):
    plan = partition(network(), stages, "uniform", batches(1)[0][0])
    defaults = {"optimizer": {"kind": "SGD", "lr": 0.1, "arguments": {"momentum": 0.9}}, "capacity": 2}
    defaults |= {"global_correction": {"every": EVERY, "steps": STEPS}}
    return Trainer(plan, device="cpu", observer=ignore, **(defaults | options))


@pytest.mark.parametrize(("accumulate", "critic"), [(1, "head"), (2, "head"), (1, "sgr")])
def test_end_to_end_steps_are_plain_backpropagation(accumulate, critic):
    """Step 0 is local, all others are not: from its end on, plain PyTorch comes to the same weights, bit for bit."""
    correction = {"every": 1, "steps": 9}
    options = {"accumulate": accumulate, "critic": critic, "optimizer": {"kind": "SGD", "lr": 0.1}}
    trained = trainer(global_correction=correction, **options)
    given = batches(4 * accumulate)
    trained.fit(given, 1)
    plain = copy.deepcopy(trained.plan.module).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    trained.fit(given, 3)
    for number, (inputs, target) in enumerate(given[accumulate:]):
        (F.cross_entropy(plain(inputs), target) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert differences(dict(trained.plan.module.state_dict()), dict(plain.state_dict())) == []


def test_critics_do_not_learn_in_them():
    trained = trainer()
    trained.fit(batches(9), EVERY)
    before = weights(trained)
    trained.fit(batches(9), STEPS)
    changed = differences(weights(trained), before)
    assert any("trunk" in name for name in changed)
    assert not any("critic" in name for name in changed)


def test_a_second_fit_goes_on_where_the_first_ended():
    once, twice = trainer(), trainer()
    once.fit(batches(10), 10)
    twice.fit(batches(10), 4)
    twice.fit(batches(10), 6)
    assert differences(weights(once), weights(twice)) == []


def _train(steps, delays):
    trained = trainer()

    def slow(method):
        def run(stage, *arguments):
            time.sleep(delays.get(stage.index, 0.0))
            return method(stage, *arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train", "resume"):
            patch.setattr(Stage, name, slow(getattr(Stage, name)))
        report = trained.fit(batches(steps), steps, validate=batches(2), validate_every=2)
    return weights(trained), [dict(link) for link in report.links]


def test_ranks_equal_one_process_whatever_the_timing(tmp_path):
    """Laws 2 and 3, and what is counted: in end-to-end steps every activation has a gradient that comes back."""
    together, links = _train(11, {})
    expected = [(11 - len(LOCAL)) * B * WIDTH * 4] * 3
    assert [link["payload_bytes_backward"] for link in links] == expected
    for name, delays in {"slow last": {3: 0.01}, "slow first": {0: 0.01}}.items():
        found = values(launch(_train, 11, delays, size=4, folder=tmp_path / name))
        apart = {key: tensor for part, _ in found for key, tensor in part.items()}
        assert differences(together, apart) == [], name
        assert [link["payload_bytes_backward"] for link in found[0][1]] == expected


def test_none_is_end_to_end_while_critics_warm_up():
    one = trainer(critic_warmup=4, global_correction={"every": 1, "steps": 1})
    one.build()
    before = weights(one)
    one.fit(batches(4), 4)
    after = weights(one)
    own = [key for key in before if "trunk" in key and key[0] != "3" and key.endswith(("weight", "bias"))]
    assert own and all(torch.equal(before[key], after[key]) for key in own)


def test_a_cascade_is_refused():
    """Its critics learn from every packet; stages that wait at first, too, would leave some out."""
    with refused("rule-needs-every-packet", UsageError, "global_correction", "cascade"):
        trainer(critic_target={"kind": "cascade"})
    with refused("rule-needs-every-packet", UsageError, "`stagger`", "mix"):
        trainer(critic_target={"kind": "mix"}, global_correction=None, stagger=3)


class Fuse(nn.Module):
    """Passes its input on; raises once, at the training packet after it is armed."""

    def __init__(self):
        super().__init__()
        self.armed = False

    def forward(self, hidden):
        if self.armed and self.training:
            self.armed = False
            raise ValueError("blown")
        return hidden


@pytest.mark.parametrize("options", [{}, {"global_correction": None, "critic_target": {"kind": "cascade", "lag": 3}}])
def test_a_session_that_failed_leaves_nothing_that_the_next_waits_for(options):
    torch.manual_seed(1)
    fuse = Fuse()
    layers = [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), fuse), nn.Linear(WIDTH, CLASSES)]
    plan = partition(layers, 3, "uniform", batches(1)[0][0], device="cpu")
    defaults = {"critic": "head", "capacity": 2, "timeout_seconds": 5, "global_correction": {"every": 2, "steps": 1}}
    trained = Trainer(plan, device="cpu", observer=ignore, **(defaults | options))
    trained.fit(batches(6), 2)
    fuse.armed = True  # packet 2 is an end-to-end one
    with pytest.raises(ValueError, match="blown"):
        trained.fit(batches(6), 2)
    assert len(trained.evaluate(batches(2))) == 3
    assert trained.fit(batches(6), 5).steps == 7
