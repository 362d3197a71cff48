"""What a script may pass as critic or optimizer: a bad key is named where it is, with the keys of its own section."""

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.training.choices import choose_critic, choose_optimizer


@pytest.mark.parametrize(
    ("resolve", "choice", "text"),
    [
        (
            choose_optimizer,
            {"kind": "AdamW", "learning_rate": 1e-3},
            "optimizer.learning_rate: unknown key, given 0.001; use one of arguments, kind, lr",
        ),
        (choose_optimizer, {"kind": "AdamW", "lr": 0}, "optimizer.lr: Input should be greater than 0, not 0"),
        (
            choose_critic,
            {"kind": "mlp_sr", "linear": 2},
            "critic.linear: unknown key, given 2; did you mean 'linears'?",
        ),
        (choose_critic, {"kind": "haed"}, "critic.kind: 'haed' is not known; did you mean 'head'?"),
    ],
)
def test_a_bad_section_is_one_line(resolve, choice, text):
    with pytest.raises(UsageError) as caught:
        resolve(choice)
    assert str(caught.value).startswith(text)
