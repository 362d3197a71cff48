"""Compiling: every stage and critic of a process is compiled for itself, all of it, or the run ends."""

import functools
import warnings
from unittest.mock import patch

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import TrainingError
from decoupled_pp.pipeline.compiled import compiled
from kit import check_text, ignore
from ranks import launch, values

STAGES = 10
"""More than the versions that torch's compiler makes of one piece of code (8)."""


@pytest.mark.parametrize("checkpoint_activations", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_everything_a_stage_computes_is_compiled_however_many_stages_there_are(checkpoint_activations, tmp_path):
    (runs,) = values(launch(_train_and_evaluate, checkpoint_activations, size=1, folder=tmp_path))
    parts = 2 * STAGES - 1  # the last stage has no critic
    assert runs == (8 + 2 * 3) * parts


def test_what_the_compiler_would_leave_uncompiled_is_an_error(tmp_path):
    ((code, text),) = values(launch(_too_many_forms, size=1, folder=tmp_path))
    assert code == "too-many-recompilations"
    check_text(code, text, "trunk 3", "more than 8 times")


def _train_and_evaluate(checkpoint_activations):
    """How often compiled code ran, with other sizes in every stage, an evaluation mode, and smaller last batches."""
    warnings.simplefilter("ignore")  # the compiler's own
    runs = []

    def backend(graph, _):
        return lambda *inputs: runs.append(1) or graph(*inputs)

    def batch(size):
        return torch.randn(size, 4), torch.randint(3, (size,))

    layers = [nn.Linear(4 + k, 5 + k) for k in range(STAGES - 1)]
    plan = partition([*layers, nn.Linear(3 + STAGES, 3)], STAGES, "uniform", batch(4)[0])
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        trainer = Trainer(
            plan,
            compile=True,
            checkpoint_activations=checkpoint_activations,
            device="cpu",
            observer=ignore,
        )
        held_out = [batch(4), batch(4), batch(2)]
        trainer.fit([batch(4)] * 3 + [batch(3)], 8, validate=held_out, validate_every=4)
    return len(runs)


def _too_many_forms():
    warnings.simplefilter("ignore")
    with patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        double = compiled(lambda tensor: tensor * 2, "trunk 3")
    with pytest.raises(TrainingError) as caught:
        for dimensions in range(1, 20):
            double(torch.ones([2] * dimensions))
    return caught.value.code, str(caught.value)
