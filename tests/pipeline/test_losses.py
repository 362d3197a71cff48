"""Losses by name, by reference and one's own; the held-out score weighs every target alike."""

import math

import pytest
import torch
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.losses import ExitScore, cross_entropy, find_loss, mse
from kit import refused


def test_cross_entropy_of_classes_and_of_tokens():
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.equal(cross_entropy(logits, classes), functional.cross_entropy(logits, classes))
    tokens_logits, tokens = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    by_hand = -tokens_logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(cross_entropy(tokens_logits, tokens), by_hand)


def test_ignored_targets_do_not_count():
    logits = torch.randn(3, 4)
    some, kept = torch.tensor([1, -100, 2]), torch.tensor([0, 2])
    torch.testing.assert_close(cross_entropy(logits, some), functional.cross_entropy(logits[kept], some[kept]))


def test_class_probabilities_and_tuples_of_targets():
    logits, shares = torch.randn(4, 3), torch.rand(4, 3).softmax(-1)
    assert torch.equal(cross_entropy(logits, (shares,)), functional.cross_entropy(logits, shares))
    assert torch.equal(mse(logits, (shares, torch.ones(1))), functional.mse_loss(logits, shares))


def test_finding_a_loss():
    assert find_loss("cross_entropy") is cross_entropy
    assert find_loss("torch.nn.functional:l1_loss") is functional.l1_loss
    assert find_loss(functional.l1_loss) is functional.l1_loss
    with refused("unknown-loss", UsageError, "'crossentropy'", "did you mean 'cross_entropy'"):
        find_loss("crossentropy")
    with refused("factory-missing", UsageError, "`loss`", "'l3_loss'"):
        find_loss("torch.nn.functional:l3_loss")


def test_the_score_of_unequal_batches_is_that_of_all_targets_together():
    logits, classes = torch.randn(10, 4), torch.randint(4, (10,))
    classes[7] = -100
    score = ExitScore()
    for part in (slice(0, 6), slice(6, 10)):
        score.add(cross_entropy(logits[part], classes[part]), logits[part], classes[part])
    loss, accuracy = score.result()
    counted = classes != -100
    assert loss == pytest.approx(float(functional.cross_entropy(logits, classes)), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == classes)[counted].double().mean()))


def test_a_batch_of_ignored_targets_weighs_nothing():
    score, logits = ExitScore(), torch.randn(2, 3)
    for classes in (torch.tensor([-100, -100]), torch.tensor([1, 2])):
        score.add(cross_entropy(logits, classes), logits, classes)
    assert score.result()[0] == pytest.approx(float(cross_entropy(logits, torch.tensor([1, 2]))))


def test_without_class_targets_there_is_no_accuracy():
    score, logits = ExitScore(), torch.randn(4, 3)
    score.add(mse(logits, torch.zeros(4, 3)), logits, torch.zeros(4, 3))
    assert score.result() == (pytest.approx(float(logits.square().mean())), None)


def test_no_score_without_batches():
    loss, accuracy = ExitScore().result()
    assert math.isnan(loss)
    assert accuracy is None
