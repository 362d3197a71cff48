"""What requires a gradient when `fit` begins is trained by it: layers that were unfrozen, frozen, or put in since."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from decoupled_pp import Trainer, partition
from kit import differences, ignore, states, tanh_network, vector_batches

BATCHES = vector_batches(4, 4, 6, 3)
ADAM = {"kind": "AdamW", "lr": 0.05, "arguments": {"weight_decay": 0.1}}


def freeze(network, first, frozen=True):
    network[first].requires_grad_(not frozen)


def trainer(stages=1, **options):
    network = tanh_network(3, 6, 3)
    freeze(network, 0)
    plan = partition(network, stages, "uniform", BATCHES[0][0])
    return Trainer(plan, **({"critic": "head", "optimizer": ADAM, "device": "cpu", "observer": ignore} | options))


def step(network, optimizer, number):
    inputs, target = BATCHES[number % len(BATCHES)]
    cross_entropy(network(inputs), target).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [ADAM, lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1, fused=True)])
@pytest.mark.parametrize("schedule", [None, {"kind": "linear", "warmup": 1}])
def test_one_stage_is_plain_pytorch_with_a_group_that_is_added(optimizer, schedule):
    """The moments of the others go on; those of the unfrozen layer begin with it."""
    ours = trainer(optimizer=optimizer, schedule=schedule)
    theirs = tanh_network(3, 6, 3)
    freeze(theirs, 0)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1, fused=True)
    for number in range(3):
        plain.param_groups[0]["lr"] = _rate(schedule, number, 3)
        step(theirs, plain, number)
    freeze(theirs, 0, frozen=False)
    plain.add_param_group({"params": list(theirs[0].parameters())})
    for number in range(3, 7):
        for group in plain.param_groups:
            group["lr"] = _rate(schedule, number, 7)
        step(theirs, plain, number)
    ours.fit(BATCHES, 3)
    freeze(ours.plan.module, 0, frozen=False)
    ours.fit(BATCHES, 4)
    assert differences(dict(ours.plan.module.state_dict()), dict(theirs.state_dict())) == []


def _rate(schedule, number, steps):
    if schedule is None:
        return 0.05
    return 0.05 * (0.5 if number < 1 else 1 - (number - 1) / (steps - 1))


def test_a_layer_that_is_frozen_again_keeps_its_moments():
    ours = trainer(2)
    network = ours.plan.module
    freeze(network, 0, frozen=False)
    ours.fit(BATCHES, 2)
    moments = ours.stages[0].update.optimizers[0].state[network[0][0].weight]
    freeze(network, 0)
    before = network[0][0].weight.clone()
    ours.fit(BATCHES, 2)
    assert torch.equal(network[0][0].weight, before)
    freeze(network, 0, frozen=False)
    ours.fit(BATCHES, 1)
    assert ours.stages[0].update.optimizers[0].state[network[0][0].weight] is moments
    assert moments["step"] == 3


def test_a_stage_that_was_frozen_as_a_whole_begins_to_train():
    ours = trainer(2)
    network = ours.plan.module
    network[1].requires_grad_(False)
    ours.build()
    ours.stages[0].critic.requires_grad_(False)
    ours.fit(BATCHES, 2)
    before = network[0][0].weight.clone()
    network.requires_grad_(True)
    ours.fit(BATCHES, 2)
    assert not torch.equal(network[0][0].weight, before)


def test_groups_by_name_take_what_is_theirs():
    groups = {**ADAM, "groups": [{"match": "0.*", "lr": 0.01}]}
    ours = trainer(2, optimizer=groups)
    freeze(ours.plan.module, 0, frozen=False)
    freeze(ours.plan.module, 1)
    ours.fit(BATCHES, 1)
    freeze(ours.plan.module, 1, frozen=False)
    ours.fit(BATCHES, 1)
    common, own = ours.stages[0].update.optimizers[0].param_groups
    assert [group["lr"] for group in (common, own)] == [0.05, 0.01]
    assert {id(p) for p in own["params"]} == {id(p) for p in ours.plan.module[0].parameters()}
    assert ours.plan.module[1][0].weight in set(common["params"])


def test_an_adapter_that_is_put_in_between_trains():
    ours = trainer(2)
    ours.fit(BATCHES, 1)
    adapter = nn.Linear(6, 6, bias=False)
    before = adapter.weight.detach().clone()
    ours.plan.module[0].append(adapter)
    ours.fit(BATCHES, 1)
    assert not torch.equal(adapter.weight, before)


def test_a_stage_without_a_rate_stays_frozen():
    ours = trainer(2, optimizer={**ADAM, "lr_per_stage": [0, 1]})
    ours.fit(BATCHES, 1)
    before = ours.plan.module[1][0].weight.clone()
    ours.plan.module.requires_grad_(True)
    ours.fit(BATCHES, 1)
    assert torch.equal(ours.plan.module[1][0].weight, before)


def test_save_stop_resume_with_what_was_unfrozen(tmp_path):
    def begun(folder):
        made = trainer(2, checkpoints=folder)
        made.fit(BATCHES, 2)
        freeze(made.plan.module, 0, frozen=False)
        return made

    whole = begun(tmp_path / "whole")
    whole.fit(BATCHES, 6)
    begun(tmp_path / "stopped").fit(BATCHES, 2)
    resumed = trainer(2, checkpoints=tmp_path / "stopped")
    freeze(resumed.plan.module, 0, frozen=False)
    resumed.fit(BATCHES, 8, resume=True)
    assert differences(states(resumed), states(whole)) == []
