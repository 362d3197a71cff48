"""Law 1: one stage with the true loss *is* plain PyTorch training; every parameter is equal after 20 steps."""

import copy

import pytest
import torch
from cases import ADAMW, CASES, MOMENTUM
from torch import nn
from torch.nn import functional

from kit import differences, states

STEPS = 20


def plain_pytorch(network, batches, optimizer, *, accumulate, clip_norm):
    """The loop of any PyTorch tutorial."""
    network.train()
    number = 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(accumulate):
            inputs, target = batches[number % len(batches)]
            logits = network(inputs)
            loss = functional.cross_entropy(logits.flatten(0, -2), target.flatten())
            (loss / accumulate).backward()
            number += 1
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()


@pytest.mark.parametrize(("accumulate", "clip_norm"), [(1, None), (1, 0.1), (3, 0.1)])
@pytest.mark.parametrize("fused", [True, False])  # the default is torch's fused form, where it has one
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=lambda chosen: chosen["kind"])
@pytest.mark.parametrize("case", ["gpt", "resnet"])
def test_one_stage_is_plain_training(case, optimizer, fused, accumulate, clip_norm):
    batches = CASES[case].batches(7)
    if not fused:
        optimizer = {**optimizer, "arguments": {**optimizer.get("arguments", {}), "fused": False}}
    trainer = CASES[case].trainer(1, optimizer=optimizer, accumulate=accumulate, clip_norm=clip_norm)
    theirs = copy.deepcopy(trainer.plan.module)
    initial = copy.deepcopy(theirs.state_dict())
    settings = {"lr": optimizer["lr"], "fused": fused, **optimizer.get("arguments", {})}
    their_optimizer = getattr(torch.optim, optimizer["kind"])(theirs.parameters(), **settings)

    trainer.fit(batches, STEPS)
    plain_pytorch(theirs, batches, their_optimizer, accumulate=accumulate, clip_norm=clip_norm)

    ours = states(trainer)[0]
    weights = {name: ours[f"model.{name}"] for name in theirs.state_dict()}
    assert differences(weights, theirs.state_dict()) == []
    assert differences(_moments(ours), _their_moments(theirs, their_optimizer)) == []
    assert set(dict(theirs.named_parameters())) <= {found.split(":")[0] for found in differences(weights, initial)}


@pytest.mark.parametrize("case", ["gpt", "resnet"])
def test_critics_that_are_the_rest_of_the_network_make_plain_training_of_any_number_of_stages(case):
    """Every stage then trains a copy of all that is above it, on the same batches: all copies go the same way."""
    batches = CASES[case].batches(7)
    critic = {"kind": "auglocal", "depth": 99, "weights": "network"}
    trainer = CASES[case].trainer(3, optimizer=MOMENTUM, critic=critic)
    theirs = copy.deepcopy(trainer.plan.module)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=MOMENTUM["lr"], fused=True, **MOMENTUM["arguments"])
    trainer.fit(batches, STEPS)
    plain_pytorch(theirs, batches, optimizer, accumulate=1, clip_norm=None)
    assert differences(dict(trainer.plan.module.state_dict()), dict(theirs.state_dict())) == []


def _moments(ours):
    return {name: tensor for name, tensor in ours.items() if name.startswith("optimizer.")}


def _their_moments(network, optimizer):
    return {
        f"optimizer.model.{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
