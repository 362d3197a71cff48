"""A micro-batch in which nothing counts moves nothing, whatever the rule and the critic, and the run goes on."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import TrainingError, UsageError
from kit import differences, ignore, refused, states

sys.path.append(str(Path(__file__).parent.parent / "laws"))
from cases import ADAMW, CASES, LABEL_CRITICS

CHOICES = {
    **{kind: (case, {"critic": {"kind": kind, **settings}}) for kind, (case, settings) in LABEL_CRITICS.items()},
    "cascade": ("mlp", {"critic_target": {"kind": "cascade", "lag": 3, "lr": 0.1}, "capacity": 1}),
    "mix": ("gpt", {"critic_target": {"kind": "mix", "lag": 3, "lr": 0.1}, "capacity": 1}),
    "global_correction": ("mlp", {"global_correction": {"every": 2}}),
}


def trained(case, batches, layers_only=False, **options):
    """All that training has changed, without batch statistics, which move; and the report."""
    made = CASES[case].trainer(2, optimizer=ADAMW, **options)
    report = made.fit(batches, len(batches) // options.get("accumulate", 1), validate=batches)
    kept = {}
    for stage, state in states(made).items():
        changed = {key: value for key, value in state.items() if not key.startswith(("random", "rule."))}
        changed = {key: value for key, value in changed.items() if "running" not in key and "num_b" not in key}
        kept[stage] = {key: value for key, value in changed.items() if not layers_only or "model." in key}
    return kept, report


@pytest.mark.parametrize("name", CHOICES)
def test_training_is_that_without_it(name):
    """With moments and weight decay; two packets each make a step, so that none is a part of another step."""
    case, options = CHOICES[name]
    full = CASES[case].batches(8)
    blank = [(inputs, torch.full_like(target, -100)) for inputs, target in full[:2]]
    between = [*full[:4], *blank, *full[4:]]
    counts_packets = "critic" not in options
    if counts_packets:  # critics learn at a lag, and steps are end-to-end, by number: what comes after differs
        full, between = full[:4], [*full[:4], *blank]
    wanted, _ = trained(case, full, accumulate=2, layers_only=counts_packets, **options)
    found, report = trained(case, between, accumulate=2, layers_only=counts_packets, **options)
    assert differences(wanted, found) == []
    assert all(one.val_loss is None or one.val_loss == one.val_loss for one in report.exits)


def test_a_step_of_which_a_part_counts_is_that_part_alone():
    full = CASES["gpt"].batches(2)
    blank = [(inputs, torch.full_like(target, -100)) for inputs, target in full]
    wanted, _ = trained("gpt", full)
    for halves in (zip(full, blank, strict=True), zip(blank, full, strict=True)):
        found, report = trained("gpt", [one for pair in halves for one in pair], accumulate=2)
        assert differences(wanted, found) == []
        assert report.steps == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_micro_batch_without_samples_counts_for_nothing(accumulate):
    full = CASES["gpt"].batches(4)
    none = [(inputs[:0], target[:0]) for inputs, target in full[:2]]
    wanted, _ = trained("gpt", full, accumulate=accumulate)
    found, report = trained("gpt", [*full[:2], *none, *full[2:]], accumulate=accumulate)
    assert differences(wanted, found) == []
    assert report.exits[-1].val_loss is not None


def test_batch_statistics_move_as_in_plain_pytorch():
    batches = CASES["resnet"].batches(1)
    made = CASES["resnet"].trainer(1)
    network = CASES["resnet"].network()
    blank = torch.full_like(batches[0][1], -100)
    made.fit([(batches[0][0], blank)], 1)
    network.train()(batches[0][0])
    assert differences(dict(made.plan.module.state_dict()), dict(network.state_dict())) == []


def small(loss, norm=None):
    torch.manual_seed(0)
    x = torch.randn(9, 8)
    layers = [nn.Sequential(nn.Linear(8, 16), norm or nn.Identity(), nn.ReLU()), nn.Linear(16, 3)]
    plan = partition(layers, 2, "uniform", x[:8])
    return x, Trainer(plan, loss=loss, critic="head", device="cpu", observer=ignore, log_every=1)


def test_a_mean_of_no_target_in_a_loss_of_ones_own_names_the_cure():
    def loss(output, target):
        return nn.functional.cross_entropy(output, target)

    x, made = small(loss)
    with refused("loss-not-finite", TrainingError, "`count`"):
        made.fit([(x, torch.full((9,), -100))], 2)
    loss.count = lambda target: (target != -100).sum()
    _, made = small(loss)
    made.fit([(x, torch.full((9,), -100))], 2)


def test_one_sample_and_batch_normalisation_name_the_packet_and_the_cure():
    x, made = small("cross_entropy", nn.BatchNorm1d(16))
    y = torch.arange(9) % 3
    with refused("batch-too-small", UsageError, "stage 0, packet 1", "drop_last"):
        made.fit([(x[:8], y[:8]), (x[8:], y[8:])], 2)


def test_a_frozen_stage_needs_no_gradient_and_any_other_does():
    x, made = small(lambda output, target: nn.functional.cross_entropy(output.detach(), target))
    before = {key: value.clone() for key, value in made.plan.module.state_dict().items()}
    y = torch.arange(9) % 3
    with refused("loss-without-gradient"):
        made.fit([(x, y)], 3)
    assert differences(before, dict(made.plan.module.state_dict())) == []
    torch.manual_seed(0)
    plan = partition([nn.Linear(8, 4), nn.Linear(4, 3).requires_grad_(False)], 2, "uniform", x)
    Trainer(plan, critic="head", device="cpu", observer=ignore).fit([(x, y)], 2)


def test_the_training_loss_is_a_mean_over_targets():
    batches = CASES["gpt with padding"].batches(6)
    seen = []
    made = CASES["gpt with padding"].trainer(
        1, optimizer={"kind": "SGD", "lr": 1e-9}, log_every=100, observer=seen.extend
    )
    network = CASES["gpt with padding"].network()
    made.fit(batches, len(batches))
    logits = torch.cat([network(inputs) for inputs, _ in batches]).flatten(0, 1)
    wanted = nn.functional.cross_entropy(logits, torch.cat([target for _, target in batches]).flatten())
    found = [record.loss for record in seen if hasattr(record, "queue")]
    assert found == [pytest.approx(wanted.item(), rel=1e-5)]
