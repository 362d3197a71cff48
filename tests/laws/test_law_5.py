"""Law 5: k accumulated packets == one batch k times as large (1e-6 relative; layers without batch statistics)."""

import pytest
import torch
from cases import CASES, MOMENTUM, TOKENS
from torch import nn

from kit import states

STEPS = 8


@pytest.fixture(autouse=True)
def _double_precision():
    """So that the order of additions is the only difference, and far below the tolerance."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("case", ["gpt", "mlp"])
def test_parts_equal_the_whole(case, parts, clip_norm):
    small = CASES[case].batches(parts * STEPS)
    large = [_joined(small[at : at + parts]) for at in range(0, len(small), parts)]
    in_parts = CASES[case].trainer(2, accumulate=parts, clip_norm=clip_norm, optimizer=MOMENTUM)
    at_once = CASES[case].trainer(2, accumulate=1, clip_norm=clip_norm, optimizer=MOMENTUM)

    in_parts.fit(small, STEPS)
    at_once.fit(large, STEPS)

    ours, theirs = states(in_parts), states(at_once)
    for stage in (0, 1):
        assert ours[stage].keys() == theirs[stage].keys()
        for name, tensor in ours[stage].items():
            torch.testing.assert_close(tensor, theirs[stage][name], rtol=1e-6, atol=1e-12, msg=name)


CASCADE = {"kind": "cascade", "optimizer": "SGD", "lr": 0.05, "lag": 2}
RULES = {
    "label": {},
    "cascade": {"critic_target": CASCADE},
    "mix": {"critic_target": {**CASCADE, "kind": "mix"}},
    "global_correction": {"global_correction": {"every": 2}},
    "class weights": {
        "loss": nn.CrossEntropyLoss(weight=torch.linspace(1, 9, TOKENS.outputs).double(), label_smoothing=0.1)
    },
    "sum": {"loss": nn.CrossEntropyLoss(reduction="sum"), "optimizer": {"kind": "SGD", "lr": 0.002}},
}


@pytest.mark.parametrize("rule", RULES)
def test_parts_of_unequal_numbers_of_targets_equal_the_whole(rule):
    """One part in five counts nothing; of class weights it is the weights that count, and sums are not divided."""
    parts, options = 2, {"optimizer": MOMENTUM, "capacity": 1, "clip_norm": 0.5} | RULES[rule]
    if "loss" in options:  # torch's own has the classes in dimension 1
        options = options | {"loss": Flat(options["loss"])}
    small = CASES["gpt with padding"].batches(parts * STEPS)
    large = [_joined(small[at : at + parts]) for at in range(0, len(small), parts)]
    at_once = CASES["gpt with padding"].trainer(2, **options)
    if "critic_target" in options:  # a lag counts packets
        options = options | {"critic_target": options["critic_target"] | {"lag": 2 * parts}}
    in_parts = CASES["gpt with padding"].trainer(2, accumulate=parts, **options)
    of_parts = in_parts.fit(small, STEPS, validate=small)
    of_whole = at_once.fit(large, STEPS, validate=large)
    ours, theirs = states(in_parts), states(at_once)
    for stage in (0, 1):
        for name, tensor in ours[stage].items():
            if not name.startswith("rule."):  # lessons are packets
                torch.testing.assert_close(tensor, theirs[stage][name], rtol=1e-6, atol=1e-10, msg=name)
    for one, other in zip(of_parts.exits, of_whole.exits, strict=True):
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-9)
        assert one.val_accuracy == pytest.approx(other.val_accuracy, rel=1e-9)


class Flat(nn.Module):
    """torch's loss of tokens, as anybody writes it, with what it takes to weigh it."""

    class_dim = -1

    def __init__(self, loss):
        super().__init__()
        self.loss, self.reduction = loss, loss.reduction

    def forward(self, logits, target):
        return self.loss(logits.flatten(0, 1), target.flatten())

    def count(self, target):
        counted = target[target != -100]
        return len(counted) if self.loss.weight is None else self.loss.weight[counted].sum()


def _joined(batches):
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([target for _, target in batches])
