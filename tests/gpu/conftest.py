"""GPU tests: kernels that add in a fixed order, and CUDA started before the environment is compared."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))  # the small networks of the laws

if torch.cuda.is_available():
    torch.cuda.init()  # some versions set an environment variable here


@pytest.fixture(autouse=True)
def _fixed_order():
    """So that a difference is ours, as far as kernels allow it (attention's backward may add with atomics)."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a kernel that fails does so in its own test
