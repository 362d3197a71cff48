"""A network as people hand it over: with hooks, compiled, with a forward of its own, with tables that layers share."""

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, cut_after, flatten, partition, untie
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.cutting.layers import as_sequential
from decoupled_pp.run.checkpoints.opened import open_checkpoint
from kit import differences, ignore, refused, tanh_network

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
BATCHES = [(X, torch.arange(6) % 3)]

HOOKS = {
    "register_forward_pre_hook": lambda module, given: None,
    "register_forward_hook": lambda module, given, made: None,
    "register_full_backward_hook": lambda module, inputs, outputs: None,
    "register_full_backward_pre_hook": lambda module, outputs: None,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_whole_are_refused_before_and_after_the_cut(kind):
    network = tanh_network(3, 6, 3)
    plan = partition(network, 2, "uniform", X)
    getattr(network, kind)(HOOKS[kind])
    for call in (
        lambda: partition(network, 2, "uniform", X),
        lambda: Trainer(plan, critic="head", device="cpu", observer=ignore).build(),
        lambda: flatten(network),
        lambda: cut_after(network, ["0"]),
    ):
        with refused("hooks-on-the-network", UsageError, "first layer"):
            call()


def test_hooks_on_layers_run():
    """The remedy: they are part of what is trained and exported."""
    network = tanh_network(3, 6, 3)
    network[0].register_forward_pre_hook(lambda module, given: (given[0] * 2 + 1,))
    network[-1].register_forward_hook(lambda module, given, made: made * 3)
    trainer = Trainer(partition(network, 2, "uniform", X), critic="head", device="cpu", observer=ignore)
    trainer.fit(BATCHES, 2)
    loss = nn.functional.cross_entropy(trainer.export().eval()(X), BATCHES[0][1]).item()
    assert trainer.evaluate(BATCHES)[-1].val_loss == pytest.approx(loss, rel=1e-6)


def test_a_nested_network_with_hooks_stays_one_layer():
    network = nn.Sequential(tanh_network(2, 6, 6), nn.Linear(6, 3))
    network[0].register_forward_hook(lambda module, given, made: made * 3)
    assert list(dict(flatten(network).named_children())) == ["0", "1"]
    assert torch.equal(flatten(network)(X), network(X))


def test_a_forward_put_on_the_object_is_a_forward_of_its_own():
    network = tanh_network(2, 6, 3)
    network.forward = lambda x: nn.Sequential.forward(network, x) * 2
    with refused("not-a-layer-list"):
        as_sequential(network)


# --------------------------------------------------------------------------------------------------------- compiled


def compiled_network():
    network = tanh_network(3, 6, 3)
    network[1] = torch.compile(network[1], backend="eager")
    network[2][0] = torch.compile(network[2][0], backend="eager")
    network[0].compile(backend="eager")
    return network


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that the compiler looks at
def test_compiled_layers_train_like_others_and_no_name_tells(tmp_path):
    found = []
    for number, network in enumerate((tanh_network(3, 6, 3), compiled_network())):
        folder = tmp_path / str(number)
        critic = {"kind": "auglocal", "depth": 2}
        plan = partition(network, 2, [1, 3], X)
        trainer = Trainer(plan, critic=critic, checkpoints=folder, device="cpu", observer=ignore)
        trainer.fit(BATCHES, 3)
        names = [name for stage in trainer.stages for part in stage.body.modules for name, _ in part.named_modules()]
        names += open_checkpoint(next(folder.glob("step-*"))).places
        assert not any("_orig_mod" in name for name in names)
        found.append(dict(trainer.export().state_dict()))
    assert differences(*found) == []


def test_a_compiled_layer_stays_compiled_with_its_options():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    layer = nn.Linear(6, 6)
    network = as_sequential([torch.compile(layer, backend=backend), nn.Linear(6, 3)])
    assert network[0] is layer
    network(X)
    assert calls


def test_a_network_that_is_compiled_as_a_whole_is_refused():
    with refused("not-a-layer-list", UsageError, "torch.compile"):
        partition(torch.compile(tanh_network(3, 6, 3), backend="eager"), 2, "uniform", X)


# ----------------------------------------------------------------------------------------------------------- shared


class Table(nn.Module):
    """Adds a table; with `counts` it is a running mean instead."""

    def __init__(self, *, counts=False):
        super().__init__()
        self.counts = counts
        self.register_buffer("rows", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x):
        if self.counts and self.training:
            self.rows.lerp_(x.detach().mean(0), 0.1)
        return x + self.rows


class Replacing(Table):
    """Puts a new table in the place of the old one."""

    def forward(self, x):
        self.rows = self.rows * 1.01
        return x + self.rows


class Block(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.linear = table, nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.linear(self.table(x)))


def blocks(tables):
    torch.manual_seed(0)
    return [*(Block(table) for table in tables), nn.Linear(6, 3)]


def trained(layers):
    plan = partition(layers, 2, "uniform", X)
    Trainer(plan, critic="head", device="cpu", observer=ignore).fit(BATCHES, 3)
    return dict(plan.module.state_dict())


def test_a_constant_table_may_be_shared():
    """By a module that all blocks have, and by one tensor in modules of their own."""
    shared = Table()
    one_tensor = [Table() for _ in range(3)]
    for table in one_tensor:
        table.rows = shared.rows
    alone = trained(blocks([Table() for _ in range(3)]))
    assert differences(trained(blocks([shared] * 3)), alone) == []
    assert differences(trained(blocks(one_tensor)), alone) == []


@pytest.mark.parametrize("table", [Table(counts=True), Replacing()])
def test_a_table_that_forward_writes_is_refused_and_the_remedy_works(table):
    layers = blocks([table] * 3)
    with refused("tensor-shared-by-stages", UsageError, "forward writes"):
        partition(layers, 2, "uniform", X)
    trained(untie(layers))
