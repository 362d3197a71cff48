"""What a script may pass as critic or optimizer: a bad key is named where it is, with the keys of its own section."""

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.training.choices import choose_critic, choose_optimizer
from kit import refused


@pytest.mark.parametrize(
    ("choose", "choice", "code", "key", "part"),
    [
        (
            choose_optimizer,
            {"kind": "AdamW", "learning_rate": 1e-3},
            "unknown-setting",
            "optimizer.learning_rate",
            "use one of arguments, kind, lr",
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
    with refused("optimizer-already-built", UsageError, "a SGD"):
        choose_optimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
