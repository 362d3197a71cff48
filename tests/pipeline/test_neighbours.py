"""Nearest neighbours: votes by hand, a rolling memory, and in a run."""

import pytest
import torch
from torch.nn import functional as F

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import View
from decoupled_pp.pipeline.neighbours import Neighbours
from kit import refused


def test_a_vote_by_hand():
    kept, labels = torch.randn(40, 5), torch.randint(3, (40,))
    asked, wanted = torch.randn(7, 5), torch.randint(3, (7,))
    probe = Neighbours(5, 100)
    for rows, classes in zip(kept.split(8), labels.split(8), strict=True):
        probe.trained(View((), rows, classes))
    probe.evaluated(asked[:4], wanted[:4])
    probe.evaluated(asked[4:], wanted[4:])
    right = 0
    for row, label in zip(asked, wanted, strict=True):
        near = sorted(range(40), key=lambda n: -F.cosine_similarity(row, kept[n], dim=0).item())[:5]
        votes = [labels[n].item() for n in near]
        right += max(sorted(set(votes)), key=votes.count) == label.item()
    assert probe.results()["knn_accuracy"] == pytest.approx(right / 7)
    assert probe.results()["knn_accuracy"] is None


def test_only_the_last_samples_vote():
    probe = Neighbours(3, 4)
    rows = F.normalize(torch.randn(4, 5), dim=1)
    probe.trained(View((), rows, torch.zeros(4, dtype=torch.int64)))
    probe.trained(View((), rows[:2], torch.ones(2, dtype=torch.int64)))
    probe.trained(View((), rows[:2], torch.ones(2, dtype=torch.int64)))
    probe.evaluated(rows[:1], torch.ones(1, dtype=torch.int64))
    assert probe.results()["knn_accuracy"] == 1


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 7, 4), (6, 4)])
def test_images_and_sequences_are_averaged(shape):
    hidden = torch.randn(shape)
    mean = hidden.mean((2, 3)) if len(shape) == 4 else hidden.mean(1) if len(shape) == 3 else hidden
    probe = Neighbours(1, 6)
    probe.trained(View((), hidden, torch.arange(6)))
    probe.evaluated((mean * 3,), torch.arange(6))
    assert probe.results()["knn_accuracy"] == 1


def test_targets_of_positions_are_refused():
    with refused("knn-needs-classes", UsageError, "(2, 5)"):
        Neighbours(1, 6).trained(View((), torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)))


def test_in_a_run():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 32, 6, generator=generator)
    batches = [(rows, rows[:, :3].argmax(1)) for rows in inputs]
    layers = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(2)]
    plan = partition([*layers, torch.nn.Linear(6, 3)], 2, "uniform", batches[0][0])
    records = []
    report = Trainer(plan, device="cpu", knn=5, observer=records.extend).fit(batches[:5], 50, validate=batches[5:])
    assert all(0.4 < one.knn_accuracy <= 1 for one in report.exits)
    held_out = [one for one in records if one["kind"] == "validation"]
    assert [one["knn_accuracy"] for one in held_out] == [one.knn_accuracy for one in report.exits]
