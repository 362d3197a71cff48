"""Where the GPU tests run, and what they share.

    DPP_GPU_TESTS_ON=cpu pytest tests/gpu

tries the tests' own code without a GPU; what is about CUDA alone is then skipped.
"""

import os
import time

import pytest
import torch

DEVICE = torch.device("cpu") if os.environ.get("DPP_GPU_TESTS_ON") == "cpu" else torch.device("cuda", 0)
ON_CUDA = DEVICE.type == "cuda"

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
"""Marks of every module of GPU tests."""

CUDA_ONLY = pytest.mark.skipif(not ON_CUDA, reason="about CUDA alone")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32. The same kernels run on both sides and bit-equality is expected, but cuDNN and attention do not promise it."""


def assert_states_close(ours, theirs, **tolerance):
    """Compare what `cases.states` gives for two trainers."""
    assert ours.keys() == theirs.keys()
    for stage, found in ours.items():
        assert found.keys() == theirs[stage].keys()
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor.cpu(),
                theirs[stage][name].cpu(),
                **(CLOSE | tolerance),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def busy(milliseconds):
    """Keep the current stream busy for about so long (the host, on the CPU)."""
    if ON_CUDA:
        torch.cuda._sleep(int(milliseconds * 1_500_000))  # cycles
    else:
        time.sleep(milliseconds / 1000)
