"""Whatever layers return, and whatever a batch is: the weights are those of the network that passes plain tensors."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from kit import assert_equal_states, differences, ignore, merged, refused, states, vector_batches
from ranks import launch, values

WIDTH, CLASSES = 6, 3
BATCHES = vector_batches(3, 5, WIDTH, CLASSES)
State = namedtuple("State", "hidden mask")


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    edges: torch.Tensor | None = None


torch.export.register_dataclass(Graph)


class Tagged(torch.Tensor):
    """A subclass that only tags its content, as torchvision's do."""


class Wrap(nn.Module):
    """Linear, tanh, and then what `wrap` makes of it."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(WIDTH, WIDTH), wrap

    def forward(self, rows):
        return self.wrap(self.linear(rows).tanh())


class Unwrap(nn.Module):
    """Linear of what `take` finds; the middle one wraps again, so that two cuts carry the payload."""

    def __init__(self, take, outputs, wrap=lambda hidden: hidden):
        super().__init__()
        self.linear, self.take, self.wrap = nn.Linear(WIDTH, outputs), take, wrap

    def forward(self, payload):
        return self.wrap(self.linear(self.take(payload)))


def first(payload):
    return payload[0]


def local_state(hidden):
    """A class that no module holds, so that it cannot be looked up by name."""
    return LOCAL(hidden, [hidden > 0])


LOCAL = namedtuple("Hidden", "hidden extra")
LOCAL.__qualname__ = "somewhere.<locals>.Hidden"


PAYLOADS = {
    "list": (lambda h: [h, h.detach()], first),
    "nested tuple": (lambda h: (h, (h.detach(), h.detach() + 1)), first),
    "None": (lambda h: (h, None), first),
    "constants": (lambda h: {"hidden": h, "scale": 2.5, "name": "x", "length": len(h)}, lambda p: p["hidden"]),
    "dictionary": (lambda h: {"hidden": h}, lambda p: p["hidden"]),
    "ordered dictionary": (lambda h: OrderedDict(hidden=h, mask=h > 0), lambda p: p["hidden"]),
    "named tuple": (lambda h: State(h, h > 0), lambda p: p.hidden),
    "local class": (local_state, lambda p: p.hidden),
    "dataclass": (Graph, lambda p: p.nodes),
    "result of torch": (lambda h: torch.max(torch.stack([h, h - 1]), dim=0), lambda p: p.values),
    "40 tensors": (lambda h: (h, *(h.detach() + n for n in range(39))), first),
    "no dimension": (lambda h: (h, torch.tensor(2.0), torch.tensor(3)), first),
    "expanded": (lambda h: (h, torch.ones(1).expand(4)), first),
    "few bits": (lambda h: (h, h.detach().to(torch.float8_e5m2), torch.ones(2, dtype=torch.uint16)), first),
    "coo": (lambda h: (h, torch.eye(4).to_sparse()), lambda p: p[0] + 0 * p[1].to_dense().sum()),
    "subclass": (lambda h: h.as_subclass(Tagged), lambda p: p.as_subclass(torch.Tensor)),
    "conjugated": (lambda h: (h, torch.complex(h, h).conj()), lambda p: p[1].real),
}


def train(name, **options):
    wrap, take = PAYLOADS[name] if name else (lambda hidden: hidden, lambda payload: payload)
    torch.manual_seed(3)
    layers = [Wrap(wrap), Unwrap(take, WIDTH, wrap), Unwrap(take, CLASSES)]
    plan = partition(layers, 3, "uniform", BATCHES[0][0])
    trainer = Trainer(plan, **{"critic": "head", "device": "cpu", "observer": ignore} | options)
    trainer.fit(BATCHES, 4, validate=BATCHES, validate_every=2)
    return states(trainer)


CORRECTION = {"every": 2}


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_weights_are_those_of_plain_tensors(name):
    assert_equal_states(train(name, global_correction=CORRECTION), train(None, global_correction=CORRECTION))


def _train_all():
    return {name: train(name, global_correction=CORRECTION) for name in PAYLOADS}


def test_ranks_equal_one_process(tmp_path):
    together = _train_all()
    apart = values(launch(_train_all, size=3, folder=tmp_path))
    for name in PAYLOADS:
        assert differences(together[name], merged([part[name] for part in apart])) == [], name


def test_lessons_of_any_structure_are_saved(tmp_path):
    def trained(folder, name, *steps):
        wrap, take = PAYLOADS[name]
        torch.manual_seed(3)
        plan = partition([Wrap(wrap), Unwrap(take, CLASSES)], 2, "uniform", BATCHES[0][0])
        target = {"kind": "cascade", "lag": 3, "lr": 0.1}
        options = {"critic": "head", "critic_target": target, "capacity": 2, "checkpoints": tmp_path / folder}
        for count in steps:
            trainer = Trainer(plan, device="cpu", observer=ignore, **options)
            trainer.fit(BATCHES, count, resume=True)
        return states(trainer)

    for name in ("dictionary", "coo", "constants"):
        assert_equal_states(trained(f"{name} once", name, 8), trained(f"{name} twice", name, 4, 8))


def test_batches_may_be_dictionaries():
    class Read(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["rows"] * batch["scale"])

    def loss(logits, target):
        return nn.functional.cross_entropy(logits, target["classes"])

    def weights_of(layers, batches, loss):
        plan = partition(layers, 2, "uniform", batches[0][0])
        trainer = Trainer(plan, loss=loss, critic="head", device="cpu", observer=ignore)
        trainer.fit(batches, 4)
        return states(trainer)

    def layers(kind):
        torch.manual_seed(1)
        return [kind(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)]

    nested = [({"rows": x, "scale": 1.0}, {"classes": y, "weights": [None]}) for x, y in BATCHES]
    assert_equal_states(weights_of(layers(Read), nested, loss), weights_of(layers(nn.Linear), BATCHES, "cross_entropy"))


BESIDE = {
    "uint16": lambda: torch.ones(4, dtype=torch.uint16),
    "uint64": lambda: torch.ones(2, dtype=torch.uint64),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
    "no dimension": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3, dtype=torch.int32),
    "sparse truth values": lambda: torch.eye(4).bool().to_sparse(),
    "sparse": lambda: torch.eye(4).to_sparse(),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("by", ["uniform", "time"])
def test_inputs_of_any_kind(name, by):
    class Pass(nn.Linear):
        def forward(self, payload):
            return (super().forward(payload[0]), *payload[1:])

    class Last(nn.Linear):
        def forward(self, payload):
            return super().forward(payload[0])

    batches = [((inputs, BESIDE[name]()), target) for inputs, target in BATCHES]
    plan = partition([Pass(WIDTH, WIDTH), Pass(WIDTH, WIDTH), Last(WIDTH, CLASSES)], 3, by, batches[0][0])
    options = {"critic": "head", "device": "cpu", "observer": ignore, "global_correction": CORRECTION}
    report = Trainer(plan, **options).fit(batches, 4, validate=batches)
    assert all(one.val_loss > 0 for one in report.exits)


def test_samples_are_counted_by_the_target():
    """A network may take its batch in any dimension: here the sequence comes first."""

    class Last(nn.Linear):
        def forward(self, steps):
            return super().forward(steps[-1])

    batches = [(torch.randn(9, 4, WIDTH), torch.arange(4) % CLASSES)]
    plan = partition([nn.Linear(WIDTH, WIDTH), Last(WIDTH, CLASSES)], 2, "uniform", batches[0][0])
    trainer = Trainer(plan, critic=Last(WIDTH, CLASSES), device="cpu", observer=ignore)
    trainer.fit(batches, 3)
    assert [stage.samples for stage in trainer.stages] == [12, 12]


def test_batches_of_inference_mode_train_as_others_do():
    """As a data set computed beforehand by another network may be."""
    with torch.inference_mode():
        inferred = [(inputs.clone(), target.clone()) for inputs, target in BATCHES]
    trained = []
    for batches in (BATCHES, inferred):
        torch.manual_seed(1)
        plan = partition([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)], 2, "uniform", batches[0][0])
        trainer = Trainer(plan, critic="head", device="cpu", observer=ignore)
        trainer.fit(batches, 3, validate=batches)
        trained.append(states(trainer))
    assert differences(*trained) == []


def test_what_cannot_travel_is_refused_before_anything_is_trained():
    class Plain:
        pass

    @dataclasses.dataclass
    class Unknown:
        nodes: torch.Tensor

    def cut(wrap, take=first):
        return partition([Wrap(wrap), Unwrap(take, CLASSES)], 2, "uniform", BATCHES[0][0])

    with refused("output-cannot-travel", UsageError, "layer '0' (Wrap) returned a Plain at [1]"):
        cut(lambda hidden: (hidden, Plain()))
    with refused("output-cannot-travel", UsageError, "torch.export.register_dataclass(Unknown)"):
        cut(Unknown)
    torch.export.register_dataclass(Unknown)
    cut(Unknown, lambda payload: payload.nodes)  # the remedy
    with refused("output-cannot-travel", UsageError, "the sample has a ndarray"):
        partition([nn.Linear(WIDTH, CLASSES)], 1, "uniform", BATCHES[0][0].numpy())
    with refused("output-cannot-travel", UsageError, "nested tensor"):
        cut(lambda hidden: (hidden, torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)))


def test_sparse_tensors_that_need_a_gradient_are_refused_in_end_to_end_steps():
    def sparse(hidden):
        return hidden, hidden.to_sparse()

    plan = partition([Wrap(sparse), Unwrap(lambda p: p[1].to_dense(), CLASSES)], 2, "uniform", BATCHES[0][0])
    options = {"critic": "head", "device": "cpu", "observer": ignore}
    Trainer(plan, **options).fit(BATCHES, 2)
    with refused("sparse-without-gradient", UsageError, "`global_correction`", "stage 0"):
        Trainer(plan, global_correction={"every": 1}, **options).fit(BATCHES, 4)
