"""The memory of every stage, predicted: what a run then measures, and the same without storage."""

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings
from decoupled_pp.training.choices import choose_critic
from decoupled_pp.training.memory import predict_memory

SAMPLE, TARGET = torch.randn(16, 12), torch.randint(0, 5, (16,))
CRITIC = {"kind": "head"}


def layers():
    hidden = [nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Dropout(0.1)) for _ in range(5)]
    return [*hidden, nn.Linear(12, 5)]


def predict(plan, **changes):
    optimizer = OptimizerSettings(kind=changes.pop("kind", "AdamW"))
    return predict_memory(plan, choose_critic(CRITIC), loss=cross_entropy, optimizer=optimizer, **changes)


def test_activations_are_those_that_a_run_measures():
    plan = dpp.partition(layers(), 3, "uniform", SAMPLE)
    report = dpp.Trainer(plan, critic=CRITIC, device="cpu").fit([(SAMPLE, TARGET)], steps=2)
    predicted = predict(plan)
    assert [one.activations for one in predicted] == [s["saved_activation_bytes_peak"] for s in report.per_stage]
    assert [one.gradients for one in predicted] == [
        4 * (s["parameters"] + s["critic_parameters"]) for s in report.per_stage
    ]


def test_nothing_changes_on_the_meta_device():
    with torch.device("meta"):
        empty = layers()
    assert predict(dpp.partition(empty, 3, "uniform", SAMPLE)) == predict(dpp.partition(layers(), 3, "uniform", SAMPLE))


@pytest.mark.parametrize(("kind", "states"), [("SGD", 0), ("AdamW", 2)])
def test_optimizers_keep_what_they_keep(kind, states):
    """AdamW: two tensors like each parameter, and a step of 4 bytes."""
    (first, *_) = predict(dpp.partition(layers(), 3, "uniform", SAMPLE), kind=kind)
    tensors = 2 * 2 + 2 if states else 0  # two linear layers and the critic, weight and bias each
    assert first.optimizer == states * first.gradients + 4 * tensors


def test_the_peak_is_of_gradients_or_activations():
    """Both are there at once only where gradients are kept from micro-batch to micro-batch."""
    plan = dpp.partition(layers(), 3, "uniform", SAMPLE)
    one, several = predict(plan)[0], predict(plan, accumulate=2)[0]
    assert one.peak == one.weights + one.optimizer + max(one.activations, one.gradients)
    assert several.peak == one.weights + one.optimizer + one.activations + one.gradients
