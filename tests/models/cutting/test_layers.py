"""Layer lists and the trace."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.cutting import as_sequential, cut_network, trace
from kit import refused


class Counter(nn.Module):
    """Counts its calls in buffers even in eval mode: once in place, once by assignment; draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, hidden):
        self.calls += 1
        self.assigned = self.assigned + 1
        return hidden + 0 * torch.rand_like(hidden)


def test_sequential_is_returned_as_it_is():
    module = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.ReLU()))
    assert as_sequential(module) is module


def test_list_becomes_a_sequential():
    layers = [nn.Linear(2, 2), nn.ReLU()]
    module = as_sequential(layers)
    assert list(module) == layers
    assert [name for name, _ in module.named_children()] == ["0", "1"]


def test_refusals():
    class Own(nn.Sequential):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    relu = nn.ReLU()
    for layers, code, part in [
        (nn.Linear(2, 2), "not-a-layer-list", "not Linear"),
        ([], "too-few-layers", "no layers"),
        (nn.Sequential(), "too-few-layers", "no layers"),
        ([nn.ReLU(), 3], "layer-not-a-module", "int"),
        ([nn.ReLU(), None], "layer-not-a-module", "NoneType"),
        ([relu, nn.Linear(2, 2), relu], "layer-used-twice", "'0' and '2' are one ReLU"),
        (nn.Sequential(OrderedDict(a=relu, b=relu)), "layer-used-twice", "'a' and 'b' are one ReLU"),
        (Own(nn.ReLU()), "not-a-layer-list", "forward of its own"),
    ]:
        with refused(code, UsageError, part):
            as_sequential(layers)


def test_trace_returns_inputs_and_output():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).eval()
    sample = torch.randn(5, 3)
    hiddens, output = trace(module, sample)
    first = module[0](sample)
    assert [tuple(hidden.shape) for hidden in hiddens] == [(5, 3), (5, 4), (5, 4)]
    assert torch.equal(hiddens[1], first)  # the in-place layer after it did not change it
    assert torch.equal(hiddens[2], first.relu())
    assert torch.equal(output, module(sample))
    assert not any(tensor.requires_grad for tensor in (*hiddens, output))


def test_trace_runs_in_eval_mode():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    sample = torch.randn(5, 3)
    assert torch.equal(trace(module, sample)[1], module.eval()(sample))


def test_trace_passes_tuples_as_one_argument():
    class Split(nn.Module):
        def forward(self, hidden):
            return hidden, hidden.argmax(1)

    class Join(nn.Module):
        def forward(self, pair):
            return pair[0] * pair[1].unsqueeze(1)

    hiddens, output = trace(nn.Sequential(Split(), Join()), torch.randn(5, 3))
    assert isinstance(hiddens[1], tuple)
    assert output.shape == (5, 3)


def test_trace_leaves_no_trace():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Counter(), nn.Dropout(0.5), nn.ReLU(inplace=True))
    module.train()
    module[1].eval()
    sample = torch.randn(5, 3)
    kept, state, rng = sample.clone(), {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    buffer = module[2].assigned
    flags = [part.training for part in module.modules()]
    trace(module, sample)
    assert torch.equal(sample, kept)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())
    assert module[2].assigned is buffer
    assert torch.equal(rng, torch.get_rng_state())
    assert flags == [part.training for part in module.modules()]


def test_trace_is_without_trace_after_a_failure_too():
    module = nn.Sequential(Counter(), nn.Linear(4, 2)).train()
    with pytest.raises(UsageError):
        trace(module, torch.randn(5, 3))
    assert module[0].calls == 0
    assert module.training
    assert module[1].training


def test_the_sample_follows_the_layers_to_their_devices():
    """Some of them may be on a GPU since a plan was trained; here another device is stood in for by meta."""
    hiddens, output = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"), nn.ReLU()), torch.ones(5, 3))
    assert [hidden.device.type for hidden in hiddens] == ["cpu", "cpu", "meta"]
    assert (output.device.type, tuple(output.shape)) == ("meta", (5, 2))


def test_misfit_is_named():
    module = nn.Sequential(OrderedDict(first=nn.Linear(3, 4), second=nn.Linear(5, 2)))
    with refused("layer-shape-mismatch", UsageError, "layer 'second' (Linear)", "(6, 4)", "(6x4 and 5x2)"):
        trace(module, torch.randn(6, 3))


def test_bad_returns():
    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, hidden):
            return self.value

    for value, named in (({}, "a dict without a tensor"), ({"a": [nn.ReLU()]}, "a ReLU at ['a'][0]")):
        with refused("output-cannot-travel", UsageError, f"layer '0' (Returns) returned {named}"):
            trace(nn.Sequential(Returns(value)), torch.randn(2, 3))
    for value in (torch.zeros(2, dtype=torch.int64), (torch.zeros(2), torch.zeros(2))):
        with refused("output-not-a-tensor"):
            trace(nn.Sequential(Returns(value)), torch.randn(2, 3))


def test_lazy_layers_get_their_weights_from_the_sample():
    """The same weights as by a first run of one's own; statistics stay as they are."""

    def make():
        return [nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU()), nn.LazyLinear(3)]

    x = torch.randn(5, 2)
    torch.manual_seed(0)
    own = nn.Sequential(*make()).eval()
    own(x)
    torch.manual_seed(0)
    cut = cut_network(make(), 2, "uniform", x, None).module
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in cut.state_dict().items())
    assert cut.training
    with refused("plan-without-sample", UsageError, "'0.0.weight'"):
        cut_network(make(), 2, "uniform", None, None)
