"""What the ranks of a launch do together outside of training."""

import pytest
import torch

from decoupled_pp.links import join_world
from ranks import PATIENCE, launch

TENSORS = (
    torch.arange(6.0).reshape(2, 3),
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.ones(4, dtype=torch.bfloat16),
    torch.arange(6).reshape(2, 3).t(),
    torch.empty(0),
)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_broadcast_reaches_every_rank(source, tmp_path):
    for result in launch(_broadcast, source, size=3, folder=tmp_path):
        for got, expected in zip(result.value, TENSORS, strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype


def _broadcast(source):
    world = join_world(PATIENCE)
    held = [tensor.clone() if world.rank == source else torch.zeros_like(tensor) for tensor in TENSORS]
    for tensor in held:
        world.broadcast(tensor, source)
    return held
