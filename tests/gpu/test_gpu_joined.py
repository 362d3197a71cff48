"""Two stages on streams of their own, joined by a link, train as plain PyTorch does and never wait for the device."""

import pytest
import torch
from joined_stages import difference_from_plain_pytorch, steps_without_waiting, waiting_forbidden
from on_gpu import CUDA_ONLY, DEVICE, GPU, ON_CUDA

from benchmarks import gpu_measure
from benchmarks.gpu_measure import StageSize

pytestmark = GPU

SIZE = StageSize(width=64, blocks=1, heads=4, sequence=32, batch=2, vocabulary=97)
LARGE = StageSize(width=512, blocks=2, heads=8, sequence=256, batch=4, vocabulary=1001)
TOLERANCE = 1e-2
"""Expected is 0. On CUDA, attention's backward adds with atomics in varying order: about 2^-8 of a bf16 gradient."""


@pytest.mark.parametrize("size", [SIZE, pytest.param(LARGE, marks=CUDA_ONLY)], ids=["small", "large"])
def test_they_train_as_plain_pytorch(size):
    assert difference_from_plain_pytorch(size, DEVICE, steps=5) <= (TOLERANCE if ON_CUDA else 0.0)


def test_a_wrong_pipeline_would_be_found(monkeypatch):
    """One that trains on other targets is far off."""
    run_joined = gpu_measure.run_joined
    monkeypatch.setattr(gpu_measure, "run_joined", lambda stages, packets: run_joined(stages, packets[::-1]))
    assert difference_from_plain_pytorch(SIZE, DEVICE, steps=3) > TOLERANCE


def test_the_loop_does_not_wait_for_the_device():
    assert steps_without_waiting(SIZE, DEVICE, steps=5, warm_up=3) is None


@CUDA_ONLY
def test_a_wait_in_the_loop_would_be_found():
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_forbidden(DEVICE):
        torch.ones(1, device=DEVICE).item()
    assert torch.cuda.get_sync_debug_mode() == 0
