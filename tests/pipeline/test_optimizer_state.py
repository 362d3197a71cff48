"""What counts as an optimizer's state, and what a checkpoint cannot hold."""

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.optimizer_state import changed_entries, group_entries, make_state, named_state, reset_entries
from kit import ignore, refused

CPU = torch.device("cpu")


def test_only_what_steps_have_changed_is_state():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    before = group_entries([optimizer])
    optimizer.param_groups[0].update(lr=0.2, k=3)
    assert changed_entries([optimizer], before, scheduled=False) == {"0.0.lr": 0.2, "0.0.k": 3}
    assert changed_entries([optimizer], before, scheduled=True) == {"0.0.k": 3}

    fresh = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.5)
    reset_entries([fresh], group_entries([fresh]), changed_entries([optimizer], before, scheduled=False))
    assert {key: fresh.param_groups[0][key] for key in ("lr", "momentum", "k")} == {"lr": 0.2, "momentum": 0.5, "k": 3}


@pytest.mark.parametrize("kind", ["AdamW", "Adafactor", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_the_state_that_is_made_is_that_of_a_real_step(kind):
    def optimizer():
        return getattr(torch.optim, kind)([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))])

    def fields(made):
        names = {p: str(k) for k, p in enumerate(made.param_groups[0]["params"])}
        return {
            (name, field): getattr(value, "shape", type(value)) for name, field, value in named_state([made], names)
        }

    real, made = optimizer(), optimizer()
    for parameter in real.param_groups[0]["params"]:
        parameter.grad = torch.rand_like(parameter)
    real.step()
    random = torch.get_rng_state()
    make_state([made], made.param_groups[0]["params"], CPU)
    assert fields(made) == fields(real) != {}
    assert torch.equal(torch.get_rng_state(), random)


def test_what_a_checkpoint_cannot_hold_is_refused_before_anything_is_trained(tmp_path):
    class Odd(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.param_groups[0]["memory"] = {}

    def trainer(**options):
        plan = partition([nn.Linear(2, 3), nn.Linear(3, 2)], 2, "uniform", torch.zeros(4, 2))
        return Trainer(plan, optimizer=Odd, device="cpu", observer=ignore, **options)

    trainer().build()  # without checkpoints all is well
    with refused("optimizer-state-not-savable", UsageError, "keeps a dict", "'memory'"):
        trainer(checkpoints=tmp_path).build()
