"""Saved activations: bytes against a count by hand, and released as backward lets go."""

import gc

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from decoupled_pp.pipeline.activations import SavedActivations

B, I, H, O = 5, 3, 7, 2  # noqa: E741 - batch, inputs, hidden, outputs
FLOAT = 4


def held(saved):
    gc.collect()
    return saved._held


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def test_linear_relu_linear_by_hand():
    """Each linear layer saves its input; ReLU saves its output, which is the second linear layer's input: once."""
    network = nn.Sequential(nn.Linear(I, H), nn.ReLU(), nn.Linear(H, O))
    with SavedActivations(tensors(network)) as saved:
        output = network(torch.randn(B, I))
        forward = saved.peak
    assert forward == (B * I + B * H) * FLOAT
    output.sum().backward()
    assert held(saved) == 0
    assert saved.peak == forward


def test_parameters_are_left_out_only_if_named():
    network = nn.Linear(I, O)
    inputs = torch.randn(B, I, requires_grad=True)  # then the weight is saved too
    with SavedActivations([]) as everything:
        first = network(inputs)
    with SavedActivations(network.parameters()) as activations:
        second = network(inputs)
    assert everything.peak - activations.peak == I * O * FLOAT
    assert activations.peak == B * I * FLOAT
    del first, second


def test_the_peak_is_what_was_held_at_once():
    network = nn.Linear(I, O)
    with SavedActivations(tensors(network)) as saved:
        for _ in range(3):
            network(torch.randn(B, I)).sum().backward()
    assert saved.peak == B * I * FLOAT
    assert held(saved) == 0


def test_a_tensor_saved_twice_counts_once_and_views_no_more_than_their_storage():
    data = torch.randn(B, I)
    weights = [torch.randn(I, O, requires_grad=True) for _ in range(2)]
    with SavedActivations(weights) as saved:
        outputs = [data @ weights[0], data @ weights[1], data.t().t() @ weights[0], data[1:] @ weights[0]]
    assert saved.peak == B * I * FLOAT
    del outputs


def test_a_view_of_a_large_tensor_counts_as_the_view():
    dataset, weight = torch.randn(1000, I), torch.randn(I, O, requires_grad=True)
    with SavedActivations([weight]) as saved:
        output = dataset[10 : 10 + B] @ weight
    assert saved.peak == B * I * FLOAT
    del output


def test_checkpointing_keeps_the_input_alone():
    network = nn.Sequential(nn.Linear(I, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU())
    inputs = torch.randn(B, I)
    with SavedActivations(tensors(network)) as plain:
        kept = network(inputs)
    with SavedActivations(tensors(network)) as recomputing:
        recomputed = checkpoint(network, inputs, use_reentrant=False)
    assert recomputing.peak == B * I * FLOAT
    assert plain.peak == (B * I + 2 * B * H) * FLOAT
    kept.sum().backward()
    recomputed.sum().backward()
    assert held(plain) == held(recomputing) == 0
