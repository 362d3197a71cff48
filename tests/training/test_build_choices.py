"""What a script may pass as critic or optimizer: a bad key is named where it is, with the keys of its own section."""

import ast
import re

import pytest
import torch
from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.training.choices import choose_critic, choose_optimizer, choose_schedule
from kit import refused


@pytest.mark.parametrize(
    ("choose", "choice", "code", "key", "part"),
    [
        (
            choose_optimizer,
            {"kind": "AdamW", "learning_rate": 1e-3},
            "unknown-setting",
            "optimizer.learning_rate",
            "use one of arguments, groups, kind, lr",
        ),
        (choose_optimizer, {"kind": "AdamW", "lr": 0}, "unusable-value", "optimizer.lr", "not 0"),
        (choose_critic, {"kind": "mlp_sr", "linear": 2}, "unknown-setting", "critic.linear", "did you mean 'linears'?"),
        (choose_critic, {"kind": "haed"}, "unknown-kind", "critic.kind", "did you mean 'head'?"),
    ],
)
def test_a_bad_section_is_one_line(choose, choice, code, key, part):
    with refused(code, UsageError, f"`{key}`", part) as caught:
        choose(choice)
    assert caught.value.key == key


def test_an_optimizer_that_is_built_already_is_refused():
    """One object cannot serve several stages."""
    with refused("optimizer-already-built", UsageError, "a SGD", "optimizer={'kind': 'SGD', 'lr': 0.1}"):
        choose_optimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))


def test_the_line_to_write_instead_of_a_built_optimizer_means_the_same():
    built = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    with refused("optimizer-already-built") as caught:
        choose_optimizer(built)
    line = re.search(r"optimizer=(\{.*\}), or", str(caught.value))[1]
    arguments = choose_optimizer(ast.literal_eval(line)).arguments
    assert arguments == {"betas": (0.8, 0.9), "weight_decay": 0.2}


def test_a_schedule_that_is_built_already_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with refused("schedule-already-built", UsageError, "lambda optimizer: StepLR(optimizer, ...)"):
        choose_schedule(torch.optim.lr_scheduler.StepLR(optimizer, 3))


def test_a_built_optimizer_that_no_stage_can_use_is_refused_for_that():
    built = torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])
    with refused("optimizer-needs-closure", UsageError, "LBFGS"):
        choose_optimizer(built)


OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
EVERY_THIRD = torch.optim.lr_scheduler.StepLR(OPTIMIZER, 3)


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau(OPTIMIZER), 'schedule={"kind": "plateau"}'),
        (torch.optim.lr_scheduler.ChainedScheduler([EVERY_THIRD]), "lambda optimizer: ChainedScheduler([...])"),
        ([EVERY_THIRD], "SequentialLR(optimizer, [...], milestones=[...])"),
        (["cosine", "linear"], "SequentialLR(optimizer, [...], milestones=[...])"),
    ],
)
def test_the_line_to_write_instead_of_several_schedules_or_a_special_one(choice, line):
    with refused("schedule-already-built", UsageError, line):
        choose_schedule(choice)


@pytest.mark.parametrize("choice", [None, 3])
def test_something_that_is_no_critic(choice):
    with refused("not-callable", UsageError, repr(choice), "leave it out"):
        choose_critic(choice)


def test_a_class_of_critics_that_takes_no_context():
    with refused("not-callable", UsageError, "Linear", "out_features"):
        choose_critic(nn.Linear)
