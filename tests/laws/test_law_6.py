"""Law 6: checkpointed activations == not, dropout and batch norm included; `torch.compile` == eager (tolerance)."""

import functools
import warnings
from unittest.mock import patch

import pytest
import torch
from cases import CASES, train

from kit import differences
from ranks import launch, values


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("case", ["gpt with dropout", "mlp with dropout", "resnet"])
def test_checkpointed_activations(case, stages):
    kept = train(case, stages, 5, accumulate=2)
    recomputed = train(case, stages, 5, accumulate=2, checkpoint_activations=True)
    assert differences(kept, recomputed) == []


def test_checkpointed_activations_are_not_kept():
    kept, recomputed = (_saved_bytes(checkpoint_activations=flag) for flag in (False, True))
    assert all(few < many for few, many in zip(recomputed, kept, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("critic", ["head", "collaborative"])
def test_compiled(critic, backend, tmp_path):
    """A critic whose logits the stage scores, and one with an objective of its own; inductor is what users get."""
    eager = train("mlp", 2, 4, critic=critic)
    (compiled,) = values(launch(_compiled, critic, backend, size=1, folder=tmp_path))
    for stage in (0, 1):
        for name, tensor in eager[stage].items():
            torch.testing.assert_close(compiled[stage][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def _compiled(critic, backend):
    """In a process of its own: the compiler keeps threads and processes for its next job."""
    warnings.simplefilter("ignore")  # the compiler's own
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        return train("mlp", 2, 4, critic=critic, compile=True)


def _saved_bytes(**options):
    report = CASES["gpt"].trainer(2, **options).fit(CASES["gpt"].batches(1), 1)
    return [record["saved_activation_bytes_peak"] for record in report.per_stage]
