"""Law 5: k accumulated packets == one batch k times as large (1e-6 relative; layers without batch statistics)."""

import pytest
import torch
from cases import CASES, MOMENTUM

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


def _joined(batches):
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([target for _, target in batches])
