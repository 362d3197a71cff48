"""cut_network: each way to cut, measuring without a trace, shared parameters."""

import itertools
import random
from collections import OrderedDict
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import count_parameters
from decoupled_pp.critics import build_critic
from decoupled_pp.models.cutting import (
    critic_context,
    cut_network,
    measure_critics,
    measure_layers,
    stand_in_objective,
    trace,
)
from decoupled_pp.settings.critics import AuglocalCritic
from kit import refused


class Clock:
    """Stands in for time.perf_counter, so that a busy machine changes nothing: a tick per look and the slow layers."""

    now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("decoupled_pp.models.cutting.measure.time.perf_counter", CLOCK)


class Slow(nn.Module):
    """A linear layer that takes `seconds` in forward, by the stand-in clock."""

    def __init__(self, seconds, inputs=4, outputs=4):
        super().__init__()
        self.linear, self.seconds = nn.Linear(inputs, outputs), seconds

    def forward(self, hidden):
        CLOCK.now += self.seconds
        return self.linear(hidden)


def network(*seconds):
    return nn.Sequential(OrderedDict((f"layer{i}", Slow(cost)) for i, cost in enumerate(seconds)))


def linear_critic(context):
    return nn.Linear(context.hidden.shape[1], context.output.shape[1])


SAMPLE = torch.randn(3, 4)


def test_uniform_and_listed():
    module = network(0, 0, 0, 0)
    plan = cut_network(module, 2, "uniform", None, None)
    assert (plan.module, plan.boundaries, plan.layer_seconds) == (module, (0, 2, 4), None)
    assert cut_network(list(module), 2, [1, 3], SAMPLE, None).boundaries == (0, 1, 4)


def test_parameters_count_the_critics():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 40), nn.Linear(40, 4)]  # 20, 20, 200, 164
    assert cut_network(layers, 2, "parameters", SAMPLE, None).boundaries == (0, 3, 4)  # 240 | 164
    # A critic after layer 2 has 164 parameters: 404 | 164 is worse than 40 + 20 | 364.
    state = torch.get_rng_state()
    assert cut_network(layers, 2, "parameters", SAMPLE, linear_critic).boundaries == (0, 2, 4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("clock")
def test_time_balances_what_it_measures():
    plan = cut_network(network(0.004, 0.001, 0.001, 0.001, 0.001), 2, "time", SAMPLE, None)
    assert plan.boundaries == (0, 1, 5)
    assert plan.critic_seconds is None
    assert plan.layer_seconds == pytest.approx((0.004, 0.001, 0.001, 0.001, 0.001), abs=1e-5)


@pytest.mark.usefixtures("clock")
def test_time_counts_the_critics():
    """Where the critic is slow is no good place to cut."""

    def critic(context):
        return Slow({1: 0.001, 2: 0.020, 3: 0.003}[context.boundary])

    plan = cut_network(network(0.001, 0.001, 0.001, 0.001), 2, "time", SAMPLE, critic)
    assert plan.boundaries == (0, 1, 4)
    assert plan.critic_seconds == pytest.approx((0.001,), abs=1e-5)


@pytest.mark.usefixtures("clock")
def test_time_counts_the_second_pass_of_critics_that_learn_from_losses():
    """Under a cascade a critic goes forward once more, when the next stage's losses have come."""
    layers = network(0.001, 0.001, 0.001)
    once = cut_network(layers, 2, "time", SAMPLE, lambda context: Slow(0.002))
    twice = cut_network(layers, 2, "time", SAMPLE, lambda context: Slow(0.002), relearned=True)
    assert once.critic_seconds == pytest.approx((0.002,), abs=1e-5)
    assert twice.critic_seconds == pytest.approx((0.004,), abs=1e-5)


def test_parameters_count_the_critic_of_each_stage_itself():
    """Law 10 where the critic depends on its stage: AugLocal's is deeper near the input."""
    critic = build_critic(AuglocalCritic(kind="auglocal", depth=5, pyramid=1.0))
    draw = random.Random(0)
    for _ in range(20):
        layers = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(draw.randint(1, 4)))) for _ in range(8)]
        module, stages = nn.Sequential(*layers), 4
        traced = trace(module, SAMPLE)
        own = [count_parameters(layer) for layer in layers]

        @cache
        def of_critic(stage, boundary, module=module, traced=traced, stages=stages):
            if stage == stages - 1:
                return 0
            return count_parameters(
                critic(critic_context(module, *traced, boundary=boundary, stage=stage, stages=stages))
            )

        def largest(boundaries, own=own, of_critic=of_critic):
            runs = enumerate(itertools.pairwise(boundaries))
            return max(sum(own[first:end]) + of_critic(stage, end) for stage, (first, end) in runs)

        every = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), stages - 1)]
        found = cut_network(module, stages, "parameters", SAMPLE, critic).boundaries
        assert largest(found) == min(largest(boundaries) for boundaries in every)


@pytest.mark.usefixtures("clock")
def test_time_counts_the_critic_of_each_stage_itself_and_measures_what_looks_alike_once():
    measured = []

    class Counted(Slow):
        def forward(self, hidden):
            measured.append(self.seconds)
            return super().forward(hidden)

    layers = network(0.01, 0.01, 0.01, 0.01, 0.03, 0.03)
    plan = cut_network(layers, 3, "time", SAMPLE, lambda context: Counted(0.02 * context.stage))
    assert plan.boundaries == (0, 4, 5, 6)  # 0.04, 0.03 + 0.02, 0.03: the first stage's critic costs nothing
    assert plan.critic_seconds == pytest.approx((0, 0.02), abs=1e-5)
    assert measured.count(0.0) == measured.count(0.02) == 4 * (2 + 5)

    measured.clear()
    cut_network(layers, 3, "time", SAMPLE, lambda context: Counted(0.001))
    assert len(measured) == 5 * (2 + 5)  # one for every boundary, not for every stage


@pytest.mark.usefixtures("clock")
def test_a_cut_without_possible_critic_is_avoided():
    def critic(context):
        if context.boundary in {2, 3}:
            raise UsageError(f"no critic at {context.boundary}", code="critic-fails")
        return linear_critic(context)

    for by in ("time", "parameters"):
        assert cut_network(network(0, 0, 0, 0.001), 2, by, SAMPLE, critic).boundaries == (0, 1, 4)
        with pytest.raises(UsageError, match="no critic at 2"):
            cut_network(network(0, 0, 0, 0.001), 3, by, SAMPLE, critic)


def test_a_critic_that_fails_is_named():
    with refused("layer-shape-mismatch", UsageError, "the critic of stage 0 (Linear)", "(3, 4)"):
        cut_network(network(0, 0), 2, "time", SAMPLE, lambda context: nn.Linear(5, 4))


def test_measuring_leaves_no_trace():
    module = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3)
    ).eval()
    sample = torch.randn(3, 4)
    state, kept, rng = {k: v.clone() for k, v in module.state_dict().items()}, sample.clone(), torch.get_rng_state()
    plan = cut_network(module, 2, "time", sample, linear_critic, F.cross_entropy)
    assert len(plan.layer_seconds) == 5
    assert all(seconds > 0 for seconds in plan.layer_seconds)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(sample, kept)
    assert not any(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_measures_embeddings_layers_without_parameters_and_tuples():
    class Split(nn.Module):
        def forward(self, hidden):
            return hidden, hidden.argmax(-1)

    class Join(nn.Module):
        def forward(self, pair):
            return pair[0] * pair[1].unsqueeze(-1)

    module = nn.Sequential(nn.Identity(), nn.Embedding(9, 4), Split(), Join(), nn.Linear(4, 9))
    hiddens, output = trace(module, torch.randint(9, (2, 5)))
    assert len(measure_layers(module, hiddens, torch.device("cpu"))) == 5
    assert output.shape == (2, 5, 9)


def test_the_loss_is_measured_with_a_target_that_fits():
    def tokens(logits, target):
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())

    def picky(logits, target):
        raise KeyError("my own target form")

    logits = torch.randn(2, 5, 9)
    zeros = torch.zeros(2, 5, dtype=torch.int64)
    assert stand_in_objective(tokens, logits)(logits) == tokens(logits, zeros)
    assert stand_in_objective(F.mse_loss, logits)(logits) == logits.square().mean()
    square = torch.randn(3, 3)  # a target of class indices would be broadcast, with a warning
    assert stand_in_objective(F.mse_loss, square)(square) == square.square().mean()
    assert stand_in_objective(picky, logits)(logits) == logits.square().mean()
    assert stand_in_objective(None, logits)(logits) == logits.square().mean()


def test_a_layer_that_fails_only_in_training_is_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with refused("layer-shape-mismatch", UsageError, "layer '1' (BatchNorm1d)"):
        cut_network(module, 2, "time", torch.randn(1, 4), None)


def test_refusals():
    module = network(0, 0)
    for by, sample, critic, code, part in [
        ("time", None, None, "sample-missing", "'time'"),
        ("parameters", None, linear_critic, "sample-missing", "'parameters'"),
        ("memory", SAMPLE, None, "bad-cut", "'memory' must be"),
        (None, SAMPLE, None, "bad-cut", "None must be"),
        ([1, 2], SAMPLE, None, "bad-cut", "adds up to 3"),
        ("uniform", torch.randn(3, 5), None, "layer-shape-mismatch", "layer 'layer0' (Slow)"),
    ]:
        with refused(code, UsageError, part):
            cut_network(module, 2, by, sample, critic)
    for by in ("time", "parameters", "uniform", [1, 1, 1]):
        with refused("too-few-layers", UsageError, "3", "2 layers"):
            cut_network(module, 3, by, SAMPLE, None)


def test_one_stage():
    for by in ("time", "parameters", "uniform", [2]):
        assert cut_network(network(0, 0), 1, by, SAMPLE, linear_critic).boundaries == (0, 2)


SHARED = "tensor-shared-by-stages"


def test_shared_parameters_are_refused_by_name():
    module = nn.Sequential(OrderedDict(embedding=nn.Embedding(9, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 9)))
    module.head.weight = module.embedding.weight
    with refused(SHARED, UsageError, "'embedding.weight' (stage 0)", "'head.weight' (stage 1)"):
        cut_network(module, 2, [2, 1], None, None)
    assert cut_network(module, 1, "uniform", None, None).stages == 1
    module.head.weight = nn.Parameter(module.embedding.weight.detach().clone())
    assert cut_network(module, 2, [2, 1], None, None).stages == 2


def test_sharing_inside_a_stage_is_allowed_and_views_and_buffers_are_found():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    layers[1].weight = layers[0].weight
    assert cut_network(layers, 2, [2, 2], None, None).stages == 2
    layers[1].weight = nn.Parameter(layers[0].weight.detach())  # another object, the same memory
    with refused(SHARED, UsageError, "'0.weight' (stage 0)", "'1.weight' (stage 1)", "parameter"):
        cut_network(layers, 2, [1, 3], None, None)
    layers[3].running_mean = layers[2].running_mean
    with refused(SHARED, UsageError, "'2.running_mean'", "'3.running_mean'", "shared buffer"):
        cut_network(layers, 2, [3, 1], None, None)


@pytest.mark.parametrize(("part", "overlaps"), [(slice(4, 8), True), (slice(7, 11), True), (slice(8, 12), False)])
def test_views_that_overlap_across_a_cut_are_refused(part, overlaps):
    whole = torch.randn(12, 4)
    layers = [nn.Linear(4, 8, bias=False), nn.Linear(8, 4), nn.Linear(4, 4, bias=False)]
    layers[0].weight, layers[2].weight = nn.Parameter(whole[:8]), nn.Parameter(whole[part])
    if overlaps:
        with refused(SHARED, UsageError, "'0.weight' (stage 0)", "'2.weight' (stage 1)"):
            cut_network(layers, 2, [2, 1], None, None)
    else:
        assert cut_network(layers, 2, [2, 1], None, None).stages == 2


def test_measure_critics_reports_refusals_in_place():
    module = network(0, 0, 0)
    hiddens, output = trace(module, SAMPLE)
    contexts = [critic_context(module, hiddens, output, boundary=b, stage=b - 1, stages=3) for b in (1, 2)]
    assert [len(context.hiddens) for context in contexts] == [2, 1]

    def critic(context):
        if context.stage:
            raise UsageError("not here", code="critic-fails")
        return linear_critic(context)

    objective = stand_in_objective(None, output)
    first, second = measure_critics(contexts, critic, torch.device("cpu"), objective=objective)
    assert isinstance(first, float)
    assert isinstance(second, UsageError)
