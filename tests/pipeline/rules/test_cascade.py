"""The cascade target: what a critic learns and when, what flows back, and that timing has no say."""

import copy
import time

import pytest
import torch
from torch.nn import functional as F

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.losses import cross_entropy, mse
from decoupled_pp.pipeline.rules.cascade import Lesson
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.settings.load import check_settings
from kit import differences, ignore, refused, tanh_network, vector_batches, weights
from ranks import launch, values

CPU = torch.device("cpu")
B, WIDTH, CLASSES, LAG = 4, 6, 3, 3
CASCADE = {"kind": "cascade", "lag": LAG, "lr": 0.05, "optimizer": "SGD"}


def batches(count, size=B):
    return vector_batches(count, size, WIDTH, CLASSES)


def trainer(stages=3, target=CASCADE, **options):
    plan = partition(tanh_network(3, WIDTH, CLASSES), stages, "uniform", batches(1)[0][0])
    defaults = {"optimizer": {"kind": "SGD", "lr": 0.1}, "capacity": 2}
    return Trainer(plan, device="cpu", observer=ignore, critic_target=target, **(defaults | options))


def by_hand(steps, label_share=0.0):
    """Two stages, written out: equations 3 to 7 of Lee & Lee with the losses used LAG packets later."""
    trained = trainer(2)
    trained.build()
    first, last = (copy.deepcopy(stage.trunk) for stage in trained.stages)
    critic = copy.deepcopy(trained.stages[0].critic)
    rates = [(first, 0.1), (last, 0.1), (critic, 0.05)]
    past = []
    for number, (inputs, target) in enumerate(batches(steps)):
        hidden = first(inputs)
        ours = torch.autograd.grad(F.cross_entropy(critic(hidden), target), list(first.parameters()))
        own = F.cross_entropy(last(hidden.detach()), target, reduction="none")
        theirs = torch.autograd.grad(own.mean(), list(last.parameters()))
        past.append((hidden.detach(), target, own.detach()))
        gradients = [ours, theirs, None]
        if number >= LAG:
            then, label, losses = past[number - LAG]
            again = F.cross_entropy(critic(then), label, reduction="none")
            taught = (1 - label_share) * (again - losses).abs().mean() + label_share * again.mean()
            gradients[2] = torch.autograd.grad(taught, list(critic.parameters()))
        with torch.no_grad():
            for (module, rate), found in zip(rates, gradients, strict=True):
                for parameter, gradient in zip(module.parameters(), found or (), strict=found is not None):
                    parameter.sub_(rate * gradient)
    return [p for module, _ in rates for p in module.parameters()]


@pytest.mark.parametrize(
    ("target", "share"), [(CASCADE, 0.0), ({**CASCADE, "kind": "mix", "label_share": 0.3}, 0.3)], ids=["cascade", "mix"]
)
def test_against_the_equations(target, share):
    trained = trainer(2, target)
    trained.fit(batches(9), 9)
    first, last = trained.stages
    found = [*first.trunk.parameters(), *last.trunk.parameters(), *first.critic.parameters()]
    for ours, theirs in zip(found, by_hand(9, share), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_critic_waits_for_its_first_lesson():
    trained = trainer(2)
    trained.build()
    before = copy.deepcopy(trained.stages[0].critic.state_dict())
    trained.fit(batches(LAG), LAG)
    assert all(torch.equal(before[k], v) for k, v in trained.stages[0].critic.state_dict().items())
    trained.fit(batches(1), 1)
    assert not all(torch.equal(before[k], v) for k, v in trained.stages[0].critic.state_dict().items())


def test_a_second_fit_goes_on_where_the_first_ended():
    once, twice = trainer(), trainer()
    once.fit(batches(10), 10)
    twice.fit(batches(10)[:5], 5)
    twice.fit(batches(10)[5:], 5)
    assert differences(weights(once), weights(twice)) == []


def _train(steps, options, delays):
    trained = trainer(3, **options)
    step = Stage.train

    def slow(stage, *arguments):
        result = step(stage, *arguments)
        time.sleep(delays.get(stage.index, 0.0))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "train", slow)
        report = trained.fit(batches(steps), steps)
    return weights(trained), [dict(link) for link in report.links]


def test_ranks_equal_one_process_whatever_the_timing(tmp_path):
    """Laws 2 and 3, and what is counted: 4 bytes per sample and packet flow back over each link."""
    together, links = _train(12, {}, {})
    assert [link["payload_bytes_backward"] for link in links] == [12 * B * 4] * 2
    for name, delays in {"even": {}, "slow last": {2: 0.01}, "slow first": {0: 0.01}}.items():
        found = values(launch(_train, 12, {}, delays, size=3, folder=tmp_path / name))
        apart = {key: tensor for part, _ in found for key, tensor in part.items()}
        assert differences(together, apart) == [], name
        assert [link["payload_bytes_backward"] for link in found[0][1]] == [12 * B * 4] * 2


def test_saved_and_resumed_equals_never_stopped(tmp_path):
    """Law 7: what the critics were still to learn is in the checkpoint."""
    whole = trainer(checkpoints=tmp_path / "a")
    whole.fit(batches(12), 12, save_every=7)
    trainer(checkpoints=tmp_path / "b").fit(batches(12), 7)
    resumed = trainer(checkpoints=tmp_path / "b")
    resumed.fit(batches(12), 12, resume=True)
    assert differences(weights(whole), weights(resumed)) == []
    assert not list((tmp_path / "b").rglob("*.pkl"))


def test_a_lesson_of_many_tensors_keeps_their_order():
    """Names sort as text: the tenth comes before the second."""
    saved, loaded = trainer(2), trainer(2)
    saved.build()
    loaded.build()
    hidden = tuple(torch.full((B,), float(i)) for i in range(12))
    saved.stages[0].rule.lessons.append(Lesson(7, hidden, torch.zeros(B), torch.ones(B)))
    loaded.stages[0].rule.load(saved.stages[0].rule.state())
    [lesson] = loaded.stages[0].rule.lessons
    assert [int(tensor[0]) for tensor in lesson.hidden] == list(range(12))


def test_accumulation():
    """Two packets per update are one packet of twice the size (law 5), with the lag in packets."""
    halves = batches(8, 2)
    wholes = [tuple(torch.cat(pair) for pair in zip(*halves[i : i + 2], strict=True)) for i in range(0, 8, 2)]
    small = trainer(2, {**CASCADE, "lag": 4}, accumulate=2)
    large = trainer(2, {**CASCADE, "lag": 2}, capacity=1)
    small.fit(halves, 4)
    large.fit(wholes, 4)
    for name, ours in weights(small).items():
        assert torch.allclose(ours, weights(large)[name], atol=1e-6), name


def test_the_schedule_and_clipping_leave_the_critics_optimizer_alone():
    from decoupled_pp.settings.run import ScheduleSettings

    trained = trainer(2, schedule=ScheduleSettings(kind="cosine"), clip_norm=1e-9)
    trained.build()
    before = copy.deepcopy(trained.stages[0].critic.state_dict())
    trained.fit(batches(8), 8)
    stage = trained.stages[0]
    assert stage.rule.optimizers[0].param_groups[0]["lr"] == 0.05
    assert stage.update.optimizers[0].param_groups[0]["lr"] < 0.1
    assert any((before[k] - v).abs().max() > 1e-4 for k, v in stage.critic.state_dict().items())


@pytest.mark.parametrize("shape", [(5,), (5, 4)])
def test_losses_of_samples(shape):
    logits, target = torch.randn(*shape, 7), torch.randint(7, shape)
    if len(shape) == 2:
        target[0, 1:3] = -100
    found = cross_entropy.per_sample(logits, target)
    assert found.tolist() == pytest.approx(
        [F.cross_entropy(a, b).item() for a, b in zip(logits.reshape(5, -1, 7), target.reshape(5, -1), strict=True)]
    )
    wanted = torch.randn(5, 2, 3)
    assert mse.per_sample(wanted + 2, wanted).tolist() == pytest.approx([4.0] * 5)


def test_a_lag_within_the_capacity_is_refused_in_the_words_of_its_user():
    with refused("lag-within-capacity", UsageError, "`critic_target.lag` 2", "`capacity` 2"):
        trainer(target={**CASCADE, "lag": 2})
    raw = {"name": "x", "model": {"kind": "mlp"}, "data": {"kind": "digits"}, "training": {"steps": 9}}
    with refused("lag-within-capacity", UsageError, "`critic_target.lag` 4", "`links.capacity` 4"):
        check_settings({**raw, "critic_target": {"kind": "cascade", "lag": 4}})


def test_what_cannot_be_taught():
    with refused("loss-without-samples"):
        trainer(loss=lambda logits, target: logits.square().mean()).fit(batches(1), 1)
    with refused("critic-cannot-be-taught", UsageError, "Lls has an objective of its own"):
        trainer(critic="lls").fit(batches(1), 1)


def _larger_than_the_sample():
    trained = trainer(2)
    trained.fit([*batches(3, 3 * B + 1), *batches(2)], 10)
    return weights(trained)


def test_packets_may_be_larger_than_the_sample(tmp_path):
    """The sample sizes the messages that carry losses back: more losses than one has room for take several."""
    together = _larger_than_the_sample()
    apart = values(launch(_larger_than_the_sample, size=2, folder=tmp_path))
    assert differences(together, apart[0] | apart[1]) == []
