"""A network whose output is no logit: what critics give goes through its last operation, or the run is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.cutting.closing import closing_of
from kit import ignore, refused, states

B, WIDTH, CLASSES = 8, 6, 4


class Ends(nn.Module):
    """A linear layer and an operation on what it gives."""

    def __init__(self, operation=lambda output: output):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)
        self.operation = operation

    def forward(self, inputs):
        return self.operation(self.linear(inputs))


OPERATIONS = {
    "log_softmax": (lambda o: functional.log_softmax(o, -1), nn.LogSoftmax, True),
    "module": (nn.LogSoftmax(1), nn.LogSoftmax, True),
    "by hand": (lambda o: o - o.logsumexp(-1, keepdim=True), nn.LogSoftmax, False),
    "softmax": (lambda o: o.softmax(-1)[:, :], nn.Softmax, True),
    "shares": (lambda o: o.exp() / o.exp().sum(1, keepdim=True), nn.Softmax, False),
    "sigmoid": (lambda o: o.sigmoid().unsqueeze(1), nn.Sigmoid, True),
    "in place": (lambda o: o.sigmoid_(), nn.Sigmoid, True),
    "hardtanh": (lambda o: functional.hardtanh(o, -2.0, 2.0), nn.Hardtanh, True),
    "logits": (lambda o: o, type(None), True),
    "scaled": (lambda o: 2 * o.tanh(), type(None), True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_last_operation_is_found(name):
    operation, kind, without_values = OPERATIONS[name]
    module, given = Ends(operation), torch.randn(B, WIDTH)
    closing = closing_of(module, given)
    assert type(closing) is kind
    if closing is not None:
        torch.testing.assert_close(closing(module.linear(given)), module(given).reshape(B, CLASSES))
    if without_values:
        assert type(closing_of(module.to("meta"), given.to("meta"))) is kind


@pytest.mark.parametrize("dim", [1, 2])
def test_the_dimension_of_a_softmax_is_found_where_sizes_are_equal(dim):
    given = torch.randn(3, 4, 4)
    closing = closing_of(nn.Sequential(nn.Tanh(), nn.LogSoftmax(dim)), given)
    torch.testing.assert_close(closing(given), given.log_softmax(dim))


def network(operation=None):
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]
    return [*layers, Ends(operation) if operation else Ends()]


def batches(targets):
    torch.manual_seed(2)
    return [(torch.randn(B, WIDTH), targets()) for _ in range(6)]


def trained(operation, loss, data, by="uniform", **options):
    plan = partition(network(operation), 3, by, data[0][0], loss=loss, device="cpu")
    made = Trainer(plan, loss=loss, device="cpu", observer=ignore, **({"critic": "head"} | options))
    return made, made.fit(data, 12, validate=data)


def assert_equal_runs(one, other):
    (ours, of_ours), (theirs, of_theirs) = one, other
    for stage, state in states(ours).items():
        for name, value in state.items():
            if not name.startswith("random"):
                torch.testing.assert_close(value, states(theirs)[stage][name], rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(of_ours.exits, of_theirs.exits, strict=True):
        assert a.val_loss == pytest.approx(b.val_loss, rel=1e-4)
        assert a.val_accuracy == b.val_accuracy


def log_softmax(output):
    return functional.log_softmax(output, -1)


def nll(output, target):
    return functional.nll_loss(output, target)


def bce(output, target):
    return functional.binary_cross_entropy(output, target)


CRITICS = ["head", "collaborative", "sgr", {"kind": "auglocal", "weights": "network"}]


@pytest.mark.parametrize("loss", ["nll", nn.NLLLoss(), nll], ids=["name", "module", "function"])
@pytest.mark.parametrize(
    "critic", ["head", "collaborative", "sgr", {"kind": "auglocal", "weights": "network"}], ids=str
)
def test_nll_trains_every_stage_as_cross_entropy_does(loss, critic):
    data = batches(lambda: torch.randint(CLASSES, (B,)))
    assert_equal_runs(
        trained(log_softmax, loss, data, critic=critic), trained(None, "cross_entropy", data, critic=critic)
    )


def test_nll_and_a_cascade():
    data = batches(lambda: torch.randint(CLASSES, (B,)))
    options = {"critic_target": {"kind": "mix", "lag": 2, "lr": 0.01}, "capacity": 1}
    assert_equal_runs(trained(log_softmax, "nll", data, **options), trained(None, "cross_entropy", data, **options))


@pytest.mark.parametrize("loss", [nn.BCELoss(), bce])
def test_bce_of_probabilities_trains_every_stage_as_bce_of_logits_does(loss):
    data = batches(lambda: torch.rand(B, CLASSES).round())
    assert_equal_runs(trained(torch.sigmoid, loss, data, by="time"), trained(None, "bce_with_logits", data))


def test_a_critic_that_ends_as_the_network_does_is_left_alone():
    data = batches(lambda: torch.randint(CLASSES, (B,)))
    own = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.LogSoftmax(-1))
    made, report = trained(log_softmax, "nll", data, critic=own)
    with torch.no_grad():
        hidden = made.plan.module[0].eval()(data[0][0])
        wanted = functional.nll_loss(made.stages[0].critic.eval()(hidden), data[0][1])
    assert made.evaluate(data[:1])[0].val_loss == pytest.approx(float(wanted), rel=1e-5)
    assert min(one.val_loss for one in report.exits) > 0


@pytest.mark.parametrize(
    ("loss", "operation", "part"),
    [
        ("nll", None, "log_softmax"),
        ("nll", nn.Softmax(-1), "log_softmax"),
        (nn.KLDivLoss(), None, "log_softmax"),
        (nn.BCELoss(), None, "bce_with_logits"),
    ],
)
def test_an_output_that_does_not_fit_the_loss_is_refused_and_the_remedy_works(loss, operation, part):
    data = batches(lambda: torch.randint(CLASSES, (B,)))
    plan = partition(network(operation), 3, "uniform", data[0][0], device="cpu")
    made = Trainer(plan, loss=loss, critic="head", device="cpu", observer=ignore)
    with refused("output-does-not-fit-loss", UsageError, part):
        made.build()
    Trainer(plan, critic="head", device="cpu", observer=ignore).fit(data, 2)


def test_a_bounded_output_and_a_loss_of_any_number_go_as_they_are():
    """An unbounded critic of a squared error has its minimum where a bounded one has."""
    data = batches(lambda: torch.rand(B, CLASSES))
    made, _ = trained(torch.tanh, "mse", data)
    assert type(made.stages[0].body.loss).__name__ == "Elementwise"
