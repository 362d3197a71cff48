"""Law 11: each baseline's gradients == plain PyTorch's; so are its weights after clipped, scheduled steps.

In double precision, so that the tolerance can be far below any real difference; DeepSpeed, which refuses it, in single.
"""

import pytest
import torch
from torch import nn

from decoupled_pp import partition
from decoupled_pp.links import join_world
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.baselines import BASELINES, Training, build_baseline, stages_needed
from ranks import PATIENCE, launch

CPU = torch.device("cpu")
LAYERS, WIDTH, B, STEPS, RATE, CLIP = 8, 6, 3, 3, 0.3, 0.5
PARALLEL = [kind for kind in BASELINES if kind != "backprop"]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
}
"""By what is computed in. bf16 (autocast): 2^-8 relative per operation, and sums in another order."""


def dtype_of(kind):
    return torch.float32 if kind == "deepspeed" else torch.float64


class Pair(nn.Module):
    """Two tensors between layers: the second is scaled, and both count."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, payload):
        first, second = payload if isinstance(payload, tuple) else (payload, payload * 0.5)
        return torch.tanh(self.linear(first) + second), second * 1.1


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, payload):
        first, second = payload
        return self.linear(first * second)


def parameter_dtype(dtype):
    """Autocast to bf16 leaves parameters and inputs in fp32."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def network(pairs, dtype):
    torch.manual_seed(1)
    if pairs:
        return nn.Sequential(*(Pair() for _ in range(LAYERS - 1)), Join()).to(parameter_dtype(dtype))
    hidden = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS - 1))
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 4)).to(parameter_dtype(dtype))


def batches(count, dtype):
    torch.manual_seed(2)
    return [(torch.randn(B, WIDTH).to(parameter_dtype(dtype)), torch.randint(4, (B,))) for _ in range(count)]


def loss(logits, target):
    """Far from uniform over micro-batches, so that a wrong weight of one of them shows."""
    return cross_entropy(logits, target) * (1 + target.sum())


def plain(count, pairs, dtype):
    """Gradients of one step, then weights and losses after some, with nothing but PyTorch."""
    model = network(pairs, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    gradients = None
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            losses = [loss(model(inputs), target) for inputs, target in batches(count, dtype)]
        torch.stack(losses).mean().backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return gradients, dict(model.named_parameters()), torch.stack(losses).detach()


def baseline(kind, rank, ranks, *, count, pairs, dtype):
    """The same with one rank of a baseline."""
    sample = batches(1, dtype)[0][0]
    plan = partition(network(pairs, dtype), stages_needed(kind, ranks) or 2, "uniform", sample, critic=None)
    training = Training(
        loss,
        OptimizerSettings(kind="SGD", lr=RATE, arguments={"momentum": 0.9}),
        ScheduleSettings(kind="linear"),
        STEPS,
        StageSettings(clip_norm=CLIP, precision="bf16" if dtype is torch.bfloat16 else "fp32"),
    )
    strategy = build_baseline(kind, plan, training, CPU, rank=rank, ranks=ranks)
    named = {name: p for part in strategy.parts.values() for name, p in part.layers.named_parameters()}
    strategy.gradients(batches(count, dtype))
    gradients = {name: p.grad.clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = None
    for _ in range(STEPS):
        losses = strategy.step(batches(count, dtype))
    return gradients, {name: p.detach() for name, p in named.items()}, losses


def one_rank(kind, count, pairs, dtype):
    world = join_world(PATIENCE)
    return baseline(kind, world.rank, world.size, count=count, pairs=pairs, dtype=dtype)


def check(parts, count, pairs, dtype, copies=False):
    gradients, weights, losses = plain(count, pairs, dtype)
    for which, expected in ((0, gradients), (1, weights)):
        ours = [part[which] for part in parts]
        names = [name for one in ours for name in one]
        assert sorted(names) == sorted(expected) if not copies else set(names) == set(expected)
        for one in ours:
            for name, tensor in one.items():
                torch.testing.assert_close(tensor, expected[name].detach(), **TOLERANCE[dtype])
    order = [part[2] for part in parts]
    turns = zip(*order, strict=True) if copies else order  # copies take turns, stages of a pipeline judge all or none
    found = [one for some in turns for one in some]
    torch.testing.assert_close(torch.stack(found), losses, **TOLERANCE[dtype])


@pytest.mark.parametrize("pairs", [False, True])
def test_one_process(pairs):
    check([baseline("backprop", 0, 1, count=4, pairs=pairs, dtype=torch.float64)], 4, pairs, torch.float64)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", PARALLEL)
def test_two_ranks(kind, pairs, tmp_path):
    results = launch(one_rank, kind, 4, pairs, dtype_of(kind), size=2, folder=tmp_path)
    check([result.value for result in results], 4, pairs, dtype_of(kind), copies=kind == "data_parallel")


@pytest.mark.parametrize("kind", PARALLEL)
def test_four_ranks(kind, tmp_path):
    results = launch(one_rank, kind, 8, False, dtype_of(kind), size=4, folder=tmp_path)
    check([result.value for result in results], 8, False, dtype_of(kind), copies=kind == "data_parallel")


@pytest.mark.parametrize("kind", ["1f1b", "deepspeed"])
def test_autocast(kind, tmp_path):
    results = launch(one_rank, kind, 4, True, torch.bfloat16, size=2, folder=tmp_path)
    check([result.value for result in results], 4, True, torch.bfloat16)


def normalized():
    """Layers that keep running statistics, and a last one that draws random numbers."""
    torch.manual_seed(1)
    hidden = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()) for _ in range(LAYERS - 1))
    return nn.Sequential(*hidden, nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 4)))


def statistics_and_draws(kind, count):
    """All buffers after one step, and the random state that it leaves; the last stage draws once per micro-batch."""
    world = join_world(PATIENCE)
    plan = partition(
        normalized(), stages_needed(kind, world.size), "uniform", batches(1, torch.float32)[0][0], critic=None
    )
    training = Training(loss, OptimizerSettings(kind="SGD", lr=RATE), ScheduleSettings(), STEPS)
    strategy = build_baseline(kind, plan, training, CPU, rank=world.rank, ranks=world.size)
    samples = batches(count, torch.float32)
    torch.manual_seed(5)
    strategy.gradients(samples)
    buffers = {name: b.clone() for part in strategy.parts.values() for name, b in part.layers.named_buffers()}
    return buffers, torch.get_rng_state(), plan.stages - 1 in strategy.parts


@pytest.mark.parametrize("kind", [kind for kind in PARALLEL if kind != "data_parallel"])
def test_running_statistics_and_random_numbers(kind, tmp_path):
    """Whatever a library tries before its first step leaves no trace (copies have statistics of their own)."""
    model, count = normalized(), 4
    samples = batches(count, torch.float32)
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    for inputs, _ in samples:
        model(inputs)
    expected, drawn = dict(model.named_buffers()), torch.get_rng_state()
    found = {}
    for buffers, state, draws in (
        part.value for part in launch(statistics_and_draws, kind, count, size=2, folder=tmp_path)
    ):
        found |= buffers
        assert torch.equal(state, drawn if draws else untouched)
    assert sorted(found) == sorted(expected)
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], **TOLERANCE[torch.float32])


class Enter(nn.Module):
    """Hands on (hidden state, mask, places): two of them take no gradient, and one is expanded memory."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, inputs):
        return self.linear(inputs), inputs > 0, torch.arange(WIDTH).expand(len(inputs), -1)


class Place(nn.Module):
    def __init__(self, dtype, last=False):
        super().__init__()
        self.places = nn.Embedding(WIDTH, 1, dtype=dtype)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.last = last

    def forward(self, payload):
        hidden, mask, places = payload
        hidden = torch.tanh(self.linear(hidden + self.places(places)[..., 0]) * mask)
        # A mean's gradient is one number, expanded.
        return hidden.unflatten(1, (2, 3)).mean(1) if self.last else (hidden, mask, places)


def placed(dtype):
    torch.manual_seed(1)
    return nn.Sequential(Enter(dtype), *(Place(dtype, last=n == LAYERS - 2) for n in range(LAYERS - 1)))


def placed_gradients(kind, count):
    world = join_world(PATIENCE)
    dtype = dtype_of(kind)
    stages = stages_needed(kind, world.size) or 2
    plan = partition(placed(dtype), stages, "uniform", batches(1, dtype)[0][0], critic=None)
    training = Training(cross_entropy, OptimizerSettings(kind="SGD", lr=RATE), ScheduleSettings(), STEPS)
    strategy = build_baseline(kind, plan, training, CPU, rank=world.rank, ranks=world.size)
    strategy.gradients([(inputs, target % 3) for inputs, target in batches(count, dtype)])
    return {name: p.grad for part in strategy.parts.values() for name, p in part.layers.named_parameters()}


@pytest.mark.parametrize("kind", PARALLEL)
def test_masks_and_whole_numbers_between_stages(kind, tmp_path):
    count, dtype = 4, dtype_of(kind)
    model = placed(dtype)
    inputs, targets = (torch.cat(part) for part in zip(*batches(count, dtype), strict=True))
    cross_entropy(model(inputs), targets % 3).backward()
    expected = dict(model.named_parameters())
    for part in launch(placed_gradients, kind, count, size=2, folder=tmp_path):
        for name, gradient in part.value.items():
            torch.testing.assert_close(gradient, expected[name].grad, **TOLERANCE[dtype])


UNEVEN = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5, 2.0], dtype=torch.float64))


def uneven_batches(count, dtype):
    """In every second micro-batch fewer targets count, in the second none."""
    made = batches(count, dtype)
    for number, (_, target) in enumerate(made):
        target[: (B if number == 1 else number % 2)] = -100
    return made


def uneven_step(kind, rank, ranks, count, nothing):
    """Gradients, then weights after steps with momentum, decay and a schedule, of which one counts nothing."""
    dtype = dtype_of(kind)
    plan = partition(
        network(False, dtype), stages_needed(kind, ranks) or 2, "uniform", batches(1, dtype)[0][0], critic=None
    )
    optimizer = OptimizerSettings(kind="SGD", lr=RATE, arguments={"momentum": 0.9, "weight_decay": 0.1})
    loss = nn.CrossEntropyLoss(weight=UNEVEN.weight.to(dtype))
    training = Training(loss, optimizer, ScheduleSettings(kind="linear"), STEPS)
    strategy = build_baseline(kind, plan, training, CPU, rank=rank, ranks=ranks)
    named = {name: p for part in strategy.parts.values() for name, p in part.layers.named_parameters()}
    some = uneven_batches(count, dtype)
    strategy.gradients(some)
    gradients = {name: p.grad.clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = None
    for step in range(STEPS):
        blank = [(inputs, torch.full_like(target, -100)) for inputs, target in some]
        strategy.step(blank if step == nothing else some)
    return gradients, {name: p.detach() for name, p in named.items()}, []


def uneven_rank(kind, count, nothing):
    world = join_world(PATIENCE)
    return uneven_step(kind, world.rank, world.size, count, nothing)


@pytest.mark.parametrize("kind", BASELINES)
def test_micro_batches_of_which_unequal_numbers_count(kind, tmp_path):
    """All together they are one batch; a step in which nothing counts moves the schedule alone."""
    count, nothing, dtype = 4, 1, dtype_of(kind)
    model = network(False, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1)
    inputs, targets = (torch.cat(part) for part in zip(*uneven_batches(count, dtype), strict=True))
    gradients = None
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        if step == nothing:
            continue
        UNEVEN.to(dtype)(model(inputs), targets).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    UNEVEN.to(torch.float64)
    if kind == "backprop":
        parts = [uneven_step(kind, 0, 1, count, nothing)]
    else:
        parts = [part.value for part in launch(uneven_rank, kind, count, nothing, size=2, folder=tmp_path)]
    for which, expected in ((0, gradients), (1, dict(model.named_parameters()))):
        assert set(expected) == {name for part in parts for name in part[which]}
        for part in parts:
            for name, tensor in part[which].items():
                torch.testing.assert_close(tensor, expected[name].detach(), **TOLERANCE[dtype])
