"""The held-out score weighs every target alike, however the data are split."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.losses import cross_entropy, find_loss, mse
from decoupled_pp.pipeline.score import ExitScore
from kit import ignore, refused


def scored(criterion, *batches):
    score = ExitScore(criterion)
    for logits, target in batches:
        score.add(logits, target, criterion.weight((logits, target)))
    return score.result()


def test_the_score_of_unequal_batches_is_that_of_all_targets_together():
    logits, classes = torch.randn(10, 4), torch.randint(4, (10,))
    classes[7] = -100
    loss, accuracy = scored(cross_entropy, (logits[:6], classes[:6]), (logits[6:], classes[6:]))
    counted = classes != -100
    assert loss == pytest.approx(float(functional.cross_entropy(logits, classes)), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == classes)[counted].double().mean()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_and_sums(reduction):
    logits, classes = torch.randn(10, 2), torch.tensor([0] * 8 + [1] * 2)
    plain = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 20.0]), reduction=reduction)
    loss, accuracy = scored(find_loss(plain), (logits[:7], classes[:7]), (logits[7:], classes[7:]))
    assert loss == pytest.approx(float(plain(logits, classes)), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == classes).double().mean()))


def test_parts_that_ranks_have_scored_are_joined():
    logits, classes = torch.randn(10, 4), torch.randint(4, (10,))
    parts = []
    for some in (slice(0, 3), slice(3, 10)):
        score = ExitScore(cross_entropy)
        score.add(logits[some], classes[some], len(classes[some]))
        parts.append(score.sums())
    assert ExitScore(cross_entropy).join(parts) == pytest.approx(scored(cross_entropy, (logits, classes)), rel=1e-6)


def test_a_batch_of_ignored_targets_weighs_nothing():
    logits = torch.randn(2, 3)
    batches = [(logits, torch.tensor(classes)) for classes in ([-100, -100], [1, 2])]
    assert scored(cross_entropy, *batches)[0] == pytest.approx(float(cross_entropy(*batches[1])))


def test_without_class_targets_there_is_no_accuracy():
    logits = torch.randn(4, 3)
    assert scored(mse, (logits, torch.zeros(4, 3))) == (pytest.approx(float(logits.square().mean())), None)


def test_another_loss_for_held_out_data():
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    plan = partition([nn.Linear(4, 5), nn.Linear(5, 3)], 2, "uniform", x)
    for options in ({"validate_loss": {"kind": "cross_entropy"}}, {"validation": {"loss": "cross_entropy"}}):
        made = Trainer(
            plan,
            loss={"kind": "cross_entropy", "label_smoothing": 0.5},
            critic="head",
            device="cpu",
            observer=ignore,
            **options,
        )
        last = made.evaluate(list(zip(x.split(5), y.split(5), strict=True)))[-1]
        wanted = functional.cross_entropy(plan.module.eval()(x), y).item()
        assert last.val_loss == pytest.approx(wanted, rel=1e-6)
    with refused("unknown-kind", UsageError, "`validation.loss.kind`"):
        Trainer(plan, validate_loss="crossentropy", device="cpu")


def test_no_score_without_batches():
    loss, accuracy = scored(cross_entropy)
    assert math.isnan(loss)
    assert accuracy is None
