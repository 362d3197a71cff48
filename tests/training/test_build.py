"""The digest that all ranks must agree on: every part of a recipe is in it, and nothing that is a rank's own."""

from functools import partial

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.pipeline.feed import Itinerary
from decoupled_pp.settings.run import ScheduleSettings
from decoupled_pp.training.build import plan_digest
from kit import check_text, ignore
from ranks import launch

SAMPLE = torch.zeros(4, 3)
ALIKE = {
    "loss by name": {"loss": "mse"},
    "loss with a tensor": {"loss": partial(nn.functional.cross_entropy, weight=torch.ones(2))},
    "critic by settings": {"critic": {"kind": "mlp_sr", "linears": 1}},
    "critic by module": {"critic": nn.Linear(5, 2)},
    "listed critics": {"critic": [nn.Linear(5, 2)]},
    "optimizer": {"optimizer": "SGD"},
    "optimizer's arguments": {"optimizer": {"kind": "AdamW", "arguments": {"weight_decay": 0.5}}},
    "schedule": {"schedule": ScheduleSettings(kind="cosine")},
    "clipping": {"clip_norm": 1.0},
    "precision": {"precision": "bf16"},
    "accumulation": {"accumulate": 2},
    "seed": {"seed": 1},
    "nothing": {},
}


def digest(itinerary=Itinerary(5), **options):  # noqa: B008 - frozen
    plan = partition([nn.Linear(3, 5), nn.Linear(5, 2)], 2, "uniform", SAMPLE, device="cpu")
    return plan_digest(plan, Trainer(plan, device="cpu", **options).recipe, itinerary)


def test_every_setting_counts():
    digests = [digest(**options) for options in ALIKE.values()]
    digests += [digest(capacity=5), digest(Itinerary(6)), digest(Itinerary(5, 1)), digest(Itinerary(5, save=True))]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_alike_agrees(case):
    assert digest(**ALIKE[case]) == digest(**ALIKE[case])


def test_what_is_a_ranks_own_does_not_count():
    def functions():
        return {
            "loss": lambda logits, target: logits.mean(),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        }

    assert digest(**functions()) == digest(**functions())
    assert digest(Itinerary(5, validate_every=1, save_every=2)) == digest()


def test_ranks_of_different_settings_are_refused(tmp_path):
    for result in launch(_train_differently, size=2, folder=tmp_path, may_fail=True):
        _, _, text = result.error.partition(": ")
        check_text("ranks-run-different-plans", text, "stage 0 (rank 0)", "stage 1 (rank 1)")


def _train_differently():
    plan = partition([nn.Linear(3, 5), nn.Linear(5, 2)], 2, "uniform", SAMPLE, device="cpu")
    trainer = Trainer(plan, device="cpu", observer=ignore)
    if trainer.rank == 1:
        trainer = Trainer(plan, device="cpu", optimizer={"kind": "SGD", "lr": 0.5}, critic="mlp_sr")
    trainer.fit([(SAMPLE, torch.zeros(4, dtype=torch.int64))], 2)
