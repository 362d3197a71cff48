"""Law 4: nothing flows back; whatever becomes of a later stage, the stages before it stay bit-identical.

A received tensor never requires grad. Payload bytes sent backward are counted, and are 0.
"""

import os
import time
from unittest.mock import patch

import pytest
import torch
from cases import CASES, LABEL_CRITICS
from torch import nn

from decoupled_pp.core.objective import judge_of
from decoupled_pp.core.packets import as_tuple, payload_bytes
from decoupled_pp.critics import KINDS
from decoupled_pp.links import InProcessLink, ReceivingEnd, returns
from decoupled_pp.links.messages import MessageSender
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.training import decoupled
from decoupled_pp.training.build import build_stages
from kit import differences, merged, states
from ranks import launch, values

STEPS, STAGES = 6, 3


def change_weights(stage):
    with torch.no_grad():
        for parameter in stage.trunk.parameters():
            parameter.mul_(3.0)


def change_critic(stage):
    with torch.no_grad():
        for parameter in stage.critic.parameters():
            parameter.uniform_(-1, 1)


def change_loss(stage):
    stage.body.loss = find_loss(lambda logits, target: logits.square().mean())


def change_learning_rate(stage):
    for optimizer in stage.update.optimizers:
        optimizer.param_groups[0]["lr"] = 1.0


def change_architecture(stage):
    stage.body.critic = nn.Sequential(nn.Dropout(0.5), stage.critic)
    stage.body.judge = judge_of(stage.body.critic)


def change_speed(stage):
    train = stage.train

    def slow(*arguments):
        time.sleep(0.01)
        return train(*arguments)

    stage.train = slow


CHANGES = [change_weights, change_critic, change_loss, change_learning_rate, change_architecture]


@pytest.mark.parametrize("change", [*CHANGES, change_speed])
@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_a_later_stage_does_not_reach_an_earlier_one(case, change):
    untouched, changed = _train(case, None), _train(case, change)

    assert differences(untouched[0], changed[0]) == []
    assert bool(differences(untouched[1], changed[1])) == (change in CHANGES)
    assert bool(differences(untouched[2], changed[2])) == (change in CHANGES)


def test_every_kind_of_critic_is_in_the_table():
    assert {*LABEL_CRITICS, "factory"} == set(KINDS)


@pytest.mark.parametrize("kind", LABEL_CRITICS)
def test_whatever_the_critic(kind):
    case, options = LABEL_CRITICS[kind]
    critic = {"kind": kind, **options}
    untouched, changed = _train(case, None, critic=critic), _train(case, change_weights, critic=critic)

    assert differences(untouched[0], changed[0]) == []
    assert differences(untouched[1], changed[1]) and differences(untouched[2], changed[2])
    report = CASES[case].trainer(STAGES, critic=critic).fit(CASES[case].batches(2), 2)
    assert [link["payload_bytes_backward"] for link in report.links] == [0, 0]


def test_over_ranks_too(tmp_path):
    untouched = _train("gpt with dropout", None)
    for change in (change_weights, change_loss, change_speed):
        launched = launch(_train, "gpt with dropout", change, size=STAGES, folder=tmp_path / change.__name__)
        changed = merged(values(launched))
        assert differences(untouched[0], changed[0]) == []
        assert bool(differences(untouched[1], changed[1])) == (change in CHANGES)


def test_no_received_tensor_requires_grad(tmp_path):
    here = _received_gradients("resnet")
    there = [flag for flags in values(launch(_received_gradients, "resnet", size=2, folder=tmp_path)) for flag in flags]

    assert here == there == [False] * (STEPS + 2) * 2  # payload and target of training and validation packets


def test_nothing_but_credits_is_sent_backward(tmp_path):
    sent = sum(payload_bytes(target) for _, target in CASES["mlp"].batches(STEPS)) + STEPS * 4 * 8 * 4
    for link in (_link_record("mlp"), *values(launch(_link_record, "mlp", size=2, folder=tmp_path))):
        assert link["payload_bytes_backward"] == 0
        assert link["payload_bytes_forward"] == sent


def test_what_comes_back_and_is_no_credit_is_refused(tmp_path):
    """The link takes nothing but credits, and what a rule returns (counted: tests/pipeline/rules/test_cascade.py)."""
    with pytest.raises(AssertionError, match="is no credit that is due"):  # `launch` and `values` raise what ranks did
        values(launch(_smuggle, size=2, folder=tmp_path))


@pytest.mark.parametrize("number, floats", [(-1, 4), (1000, 4), (0, 5)])
def test_losses_that_are_not_due_are_refused(number, floats, tmp_path):
    """Of a packet that was never sent, or of more samples than it has."""
    with pytest.raises(AssertionError, match=f"{floats} floats for packet {number} are not due"):
        values(launch(_smuggle, number, floats, size=2, folder=tmp_path))


def test_a_target_that_a_network_has_made_trains_every_stage_and_not_its_maker():
    """Distillation: every stage differentiates its own loss, and nothing flows into the teacher."""
    case = CASES["mlp"]
    teacher, networks = nn.Linear(7, 3), []
    for target in (teacher, lambda inputs: teacher(inputs).detach()):
        trainer = case.trainer(STAGES, loss="mse")
        trainer.fit([(inputs, target(inputs)) for inputs, _ in case.batches(2)], STEPS)
        networks.append(states(trainer))
    assert differences(*networks) == []
    assert teacher.weight.grad is None


def test_evaluation_sends_nothing_backward_and_changes_no_parameter():
    case = CASES["resnet"]
    trainer = case.trainer(STAGES)
    trainer.fit(case.batches(3), 2)
    before = states(trainer)
    trainer.evaluate(case.batches(3))
    assert differences(before, states(trainer)) == []


def _train(case, change, **options):
    """Train with stage 1 changed after it was built."""

    def build(*arguments):
        stages = build_stages(*arguments)
        for stage in stages:
            if change is not None and stage.index == 1:
                change(stage)
        return stages

    trainer = CASES[case].trainer(STAGES, **options)
    with patch.object(decoupled, "build_stages", build):
        trainer.fit(CASES[case].batches(STEPS), STEPS)
    return states(trainer)


def _received_gradients(case):
    """Whether each tensor that arrived over a link requires grad, in order."""
    flags = []

    def watched(receive):
        def look(link):
            packet = receive(link)
            flags.extend(t.requires_grad for t in (*as_tuple(packet.payload), *as_tuple(packet.target)))
            return packet

        return look

    with (
        patch.object(InProcessLink, "receive", watched(InProcessLink.receive)),
        patch.object(ReceivingEnd, "receive", watched(ReceivingEnd.receive)),
    ):
        batches = CASES[case].batches(STEPS)
        CASES[case].trainer(2).fit(batches, STEPS, validate=batches[:2])
    return flags


def _link_record(case):
    report = CASES[case].trainer(2).fit(CASES[case].batches(STEPS), STEPS)
    return dict(report.links[0])


def _smuggle(number=None, floats=0):
    """Rank 1 sends a message more after its first credit; rank 0 has to read past it for the credits it needs.

    8 bytes, or in a cascade, losses of that packet.
    """
    options = {} if number is None else {"critic_target": "cascade"}
    send, smuggled = MessageSender.send, os.environ["RANK"] == "0"

    def send_and_smuggle(sender, *arguments, **options):
        nonlocal smuggled
        send(sender, *arguments, **options)
        if not smuggled:
            smuggled = True
            if number is None:
                send(sender, torch.full((8,), 7, dtype=torch.uint8))
            else:
                for message in returns.floats_messages(sender.size, number, torch.zeros(floats)):
                    send(sender, message)

    with patch.object(MessageSender, "send", send_and_smuggle):
        return dict(CASES["mlp"].trainer(2, **options).fit(CASES["mlp"].batches(2), 40).links[0])
