"""Critic contexts for a network and a cut, without the partitioning package."""

import pytest
import torch

from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import map_payload


@pytest.fixture
def context_of():
    """A function of (network, sample, boundary, stage=0, stages=2) that returns a CriticContext."""

    def build(network, sample, boundary, stage=0, stages=2):
        hiddens = [sample]
        flags = [(part, part.training) for part in network.modules()]
        network.eval()
        with torch.no_grad():
            for layer in network:
                hiddens.append(layer(map_payload(torch.clone, hiddens[-1])))  # a layer may work in place
        for part, flag in flags:
            part.training = flag
        return CriticContext(
            stage,
            stages,
            boundary,
            hiddens[boundary],
            hiddens[-1],
            tuple(network),
            tuple(hiddens[boundary:-1]),
            sample,
        )

    return build
