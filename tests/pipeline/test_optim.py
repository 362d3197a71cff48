"""Optimizers by name and by factory, Muon's split, and schedules against their closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.optim import build_optimizers, find_optimizer
from decoupled_pp.pipeline.schedules import build_schedules, rate_factor
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from kit import differences, refused

STEPS = 10


def trunk():
    return nn.Sequential(nn.Embedding(5, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), nn.Linear(4, 5))


def build(kind="AdamW", *, critic=None, owns_head=True, network=None, **arguments):
    settings = OptimizerSettings(kind=kind, lr=0.1, arguments=arguments)
    return build_optimizers(settings, network or trunk(), critic, owns_head=owns_head)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "Adafactor"])
def test_by_name(kind):
    network, critic = trunk(), nn.Linear(4, 5)
    (optimizer,) = build(kind, network=network, critic=critic)
    assert type(optimizer) is getattr(torch.optim, kind)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert {id(p) for p in parameters(optimizer)} == {id(p) for m in (network, critic) for p in m.parameters()}


def test_arguments_reach_the_optimizer():
    (optimizer,) = build("SGD", momentum=0.9, weight_decay=0.01)
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.9, 0.01)


def test_frozen_parameters_are_left_out_and_a_frozen_stage_has_no_optimizer():
    network = trunk()
    network[0].requires_grad_(False)
    assert len(parameters(build(network=network)[0])) == len(list(network.parameters())) - 1
    assert build(network=network.requires_grad_(False)) == []


@pytest.mark.parametrize("name", ["AdamV", "LBFGS", "SparseAdam", "Optimizer", "lr_scheduler"])
def test_unusable_names_are_refused_with_the_usable_ones(name):
    with refused("unknown-optimizer", UsageError, name, "AdamW", "SGD") as caught:
        find_optimizer(name)
    assert "LBFGS," not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "ADAMW", "AdamW"])
def test_names_in_any_case(name):
    assert find_optimizer(name) is torch.optim.AdamW


FORMS = {"AdamW": True, "SGD": True, "Adagrad": True, "RMSprop": None, "Adafactor": None}


@pytest.mark.parametrize(("kind", "fused"), FORMS.items())
def test_the_fused_form_is_the_default_where_torch_has_one(kind, fused):
    assert build(kind)[0].param_groups[0].get("fused") is fused


@pytest.mark.parametrize("chosen", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"differentiable": True}])
def test_another_form_is_honoured(chosen):
    group = build("AdamW", **chosen)[0].param_groups[0]
    assert chosen.items() <= group.items() and not group["fused"]


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")])
def test_what_no_fused_form_takes_gets_the_plain_one(tensor):
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].bias = nn.Parameter(tensor)
    assert not build("AdamW", network=network)[0].param_groups[0]["fused"]


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("AdamW", {"betas": [2.0, 0.9]}, "Invalid beta parameter at index 0: 2.0"),
        ("AdamW", {"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ("SGD", {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_bad_arguments_are_refused_with_torchs_reason(kind, arguments, reason):
    with refused("optimizer-refuses-arguments", UsageError, f"torch.optim.{kind}", reason):
        build(kind, **arguments)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"momentum": 0.9}, ["no such argument", "one of betas, eps, weight_decay"]),
        ({"weight_dcay": 0.1}, ["no such argument", "did you mean 'weight_decay'?"]),
        ({"betas": 5}, "betas: torch.optim.AdamW takes a list of 2 like [0.9, 0.999], not 5"),
        ({"weight_decay": "much"}, "weight_decay: torch.optim.AdamW takes a number like 0.01, not 'much'"),
    ],
)
def test_arguments_that_torch_does_not_explain(arguments, parts):
    with refused("optimizer-refuses-arguments", UsageError, *parts) as caught:
        build("AdamW", **arguments)
    assert caught.value.key == f"optimizer.arguments.{next(iter(arguments))}"


def test_a_misspelt_name_gets_a_suggestion():
    with refused("unknown-optimizer", UsageError, "'AdmW'", "did you mean 'AdamW'?"):
        find_optimizer("AdmW")


def test_a_factory():
    network = trunk()
    (optimizer,) = build_optimizers(lambda ps: torch.optim.SGD(ps, lr=0.5), network, None, owns_head=True)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with refused("optimizer-is-none", UsageError, "returned int"):
        build_optimizers(lambda ps: 3, network, None, owns_head=True)


def test_a_factory_that_ignores_its_argument_is_refused():
    network = trunk()
    with refused("optimizer-of-other-parameters"):
        build_optimizers(lambda ps: torch.optim.SGD(network.parameters()), network[:1], None, owns_head=True)


class SharpnessAware(torch.optim.SGD):
    """Asks for a closure as published implementations do: by an assertion."""

    def step(self, closure=None):
        assert closure is not None, "this optimizer requires closure, but it was not provided"


class TwoSteps(torch.optim.SGD):
    """Steps without a closure too, and is then no more than what it wraps."""

    def first_step(self): ...

    def second_step(self): ...


class NotAlone(torch.optim.SGD):
    """Refuses as the first published implementation did."""

    def step(self, closure=None):
        raise NotImplementedError("call first_step and second_step")


class Restless(torch.optim.SGD):
    """Moves weights that have no gradient."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(torch.randn(1))


@pytest.mark.parametrize("kind", [SharpnessAware, TwoSteps, NotAlone, torch.optim.LBFGS])
def test_an_optimizer_that_needs_a_closure_is_refused_before_it_steps(kind):
    with refused("optimizer-needs-closure", UsageError, kind.__name__):
        build_optimizers(kind, trunk(), None, owns_head=True)


def test_looking_for_a_closure_moves_nothing():
    network = trunk()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    build_optimizers(Restless, network, None, owns_head=True)
    assert differences(network.state_dict(), before) == []
    assert torch.equal(torch.get_rng_state(), random)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    network, critic = trunk(), nn.Linear(4, 5)
    muon, adamw = build("Muon", network=network, critic=critic, weight_decay=0.2)
    assert [id(p) for p in parameters(muon)] == [id(network[1][1].weight)]
    assert len(parameters(adamw)) == len([*network.parameters(), *critic.parameters()]) - 1
    assert type(muon) is torch.optim.Muon
    assert type(adamw) is torch.optim.AdamW
    assert [one.param_groups[0]["weight_decay"] for one in (muon, adamw)] == [0.2, 0.2]
    assert [one.param_groups[0]["lr"] for one in (muon, adamw)] == [0.1, 0.1]


def test_muon_takes_the_last_matrix_where_it_is_not_the_head():
    network = trunk()
    muon, _ = build("Muon", network=network, owns_head=False)
    assert {id(p) for p in parameters(muon)} == {id(network[1][1].weight), id(network[2].weight)}


def test_muon_without_hidden_matrices_is_adamw():
    (only,) = build("Muon", network=nn.Sequential(nn.Embedding(5, 4)))
    assert type(only) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("settings", "closed_form"),
    [
        ({"kind": "constant"}, lambda step: 1.0),
        ({"kind": "constant", "warmup": 4}, lambda step: min(1.0, (step + 1) / 5)),
        ({"kind": "linear"}, lambda step: 1 - step / STEPS),
        ({"kind": "linear", "final": 0.2}, lambda step: 1 - 0.8 * step / STEPS),
        ({"kind": "cosine"}, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
        ({"kind": "cosine", "final": 0.2}, lambda step: 0.6 + 0.4 * math.cos(math.pi * step / STEPS)),
        (
            {"kind": "cosine", "warmup": 2},
            lambda step: (step + 1) / 3 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 8),
        ),
        ({"kind": "steps", "milestones": [3, 6], "factor": 0.5}, lambda step: 0.5 ** ((step >= 3) + (step >= 6))),
    ],
)
def test_schedules_against_their_closed_forms(settings, closed_form):
    schedule = ScheduleSettings(**settings)
    rates = [rate_factor(schedule, step, STEPS) for step in range(STEPS + 1)]
    assert rates == pytest.approx([closed_form(step) for step in range(STEPS + 1)])


def test_beyond_the_last_step_the_final_rate_stays():
    assert rate_factor(ScheduleSettings(kind="cosine", final=0.25), 99, STEPS) == pytest.approx(0.25)


def test_a_schedule_moves_every_optimizer():
    optimizers = build("Muon")
    schedules = build_schedules(ScheduleSettings(kind="linear"), optimizers, STEPS)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.09, 0.09])
    assert build_schedules(ScheduleSettings(), optimizers, STEPS) == []
