"""Counted activations against what the allocator says."""

import torch
from on_gpu import CUDA_ONLY, DEVICE, GPU

from decoupled_pp.models.gpt import Block
from decoupled_pp.pipeline.activations import SavedActivations

pytestmark = GPU


@CUDA_ONLY
def test_saved_activations_are_what_is_allocated():
    """Within 5 %: tensors of megabytes, so that the allocator's rounding to 512 bytes and small statistics vanish."""
    block = Block(512, 8, 0.1, 2).to(DEVICE)
    hidden = torch.randn(8, 256, 512, device=DEVICE)
    block(hidden).sum().backward()  # libraries' workspaces, gradients
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    with SavedActivations([*block.parameters(), *block.buffers()]) as saved:
        output = block(hidden)
        held = torch.cuda.memory_allocated(DEVICE) - before
    beside = output.numel() * output.element_size()  # the sum of the residual, which nothing needs in backward
    from_outside = hidden.numel() * hidden.element_size()  # saved by the first norm, allocated before
    torch.testing.assert_close(float(saved.peak), float(held - beside + from_outside), rtol=0.05, atol=0)
    assert saved.peak <= torch.cuda.max_memory_allocated(DEVICE) - before + from_outside
    output.sum().backward()
    del output
    assert torch.cuda.memory_allocated(DEVICE) <= before


def test_all_is_let_go_in_backward():
    block = Block(32, 2, 0.0, 2).to(DEVICE)
    with SavedActivations([*block.parameters()]) as saved:
        block(torch.randn(2, 8, 32, device=DEVICE)).sum().backward()
    assert saved.peak > 0
    assert saved._held == 0
