"""Models with a forward of their own, split at their blocks: exact, for inputs of any size, or refused by name."""

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.splitting import split_blocks
from kit import refused

V, D, B, T = 17, 8, 3, 5


class Block(nn.Module):
    """Adds what a mask and a keyword tensor let through; the first of its kind may make a bias for all."""

    def __init__(self, first=False):
        super().__init__()
        self.kind = "plain"
        self.linear = nn.Linear(D, D)
        self.bias = nn.Parameter(torch.randn(D)) if first else None

    def forward(self, hidden, mask=None, *, angles, bias=None, scale=1.0):
        bias = bias if self.bias is None else self.bias * 2
        seen = self.linear(hidden) * scale + angles[0] * angles[1]
        if mask is not None:
            seen = seen * mask[..., None]
        return hidden + torch.tanh(seen + bias), bias


class Body(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(V, D), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(first=not index) for index in range(depth))
        self.norm = nn.LayerNorm(D)

    def forward(self, tokens, mask=None):
        hidden = self.drop(self.embedding(tokens))
        angles = (torch.arange(tokens.shape[1], dtype=torch.float32)[:, None], torch.ones(1, D))
        mask = None if mask is None or bool(mask.all()) else mask.float()
        bias = None
        for block in self.blocks:
            assert block.kind == "plain"
            hidden, bias = block(hidden, mask, angles=angles, bias=bias, scale=0.5)
        return {"last": self.norm(self.drop(hidden))}


class Model(nn.Module):
    """A head over a body, as libraries nest them."""

    def __init__(self, tied=False):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.body.embedding.weight

    def forward(self, tokens, mask=None):
        return {"logits": self.head(self.body(tokens, mask)["last"])}


def logits(result):
    return result["logits"]


def sample():
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 3:] = 0
    return {"tokens": torch.randint(0, V, (B, T)), "mask": mask}


def split(model, given=None):
    return split_blocks(model, given or sample(), output=logits)


def test_gives_the_same_output_for_inputs_of_any_size():
    """And with a side that is sometimes absent: the mask of a batch without padding is None."""
    model = Model().eval()
    found = split(model)
    for tokens, mask in (
        (torch.randint(0, V, (B, T)), sample()["mask"]),
        (torch.randint(0, V, (1, 7)), torch.ones(1, 7, dtype=torch.int64)),
        (torch.randint(0, V, (6, 2)), torch.tensor([[1, 0]] * 6)),
    ):
        assert torch.equal(found.layers((tokens, mask)), logits(model(tokens, mask)))


def test_gives_the_same_gradients():
    model, given = Model(), sample()
    model.body.drop.p = 0.0
    found = split(model, given)
    model.train()
    grads = []
    for run in (lambda: logits(model(**given)), lambda: found.layers.train()(tuple(given.values()))):
        model.zero_grad()
        run().square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_mode_of_the_model(training):
    """What stands around the blocks is copied: it must train as the model would (dropout)."""
    found = split(Model().train(training))
    assert {part.training for part in found.layers.modules()} == {training}


class Statistics(Body):
    """Buffers without parameters before the blocks, a loose one beside them."""

    def __init__(self):
        super().__init__()
        self.standard = nn.BatchNorm1d(D, affine=False)
        self.register_buffer("shift", torch.randn(D))

    def forward(self, tokens, mask=None):
        hidden = self.standard(self.embedding(tokens).transpose(1, 2)).transpose(1, 2) + self.shift
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": self.norm(hidden)}


def test_buffers_without_parameters_are_the_models_own():
    model, given = Statistics(), sample()
    found = split(model, given)
    found.layers.train()(tuple(given.values()))
    assert model.standard.num_batches_tracked == 1
    state = found.layers.state_dict()
    assert sorted(found.names.values()) == sorted(model.state_dict())
    assert all(torch.equal(state[key], model.state_dict()[name]) for key, name in found.names.items())


def test_names_are_the_models_own():
    model = Model()
    found = split(model)
    state = found.layers.state_dict()
    assert {found.names[key] for key in state} == set(model.state_dict())
    assert all(torch.equal(state[key], model.state_dict()[name]) for key, name in found.names.items())


def test_splitting_leaves_no_trace():
    model, given = Model().train(), sample()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    split(model, given)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_shared_parameter_becomes_two():
    model = Model(tied=True)
    found = split(model)
    assert found.untied == {"head.weight": "body.embedding.weight"}
    assert model.head.weight is not model.body.embedding.weight
    assert torch.equal(model.head.weight, model.body.embedding.weight)
    partition(found.layers, 3, "uniform", tuple(sample().values()), critic=None)  # nothing is shared across a cut


def test_trains_in_stages():
    """Four stages lower the loss; the layers are the user's own."""
    torch.manual_seed(0)
    model, given = Model(), sample()
    payload, target = tuple(given.values()), given["tokens"]
    found = split(model, given)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = partition(found.layers, 4, "uniform", payload)
    report = Trainer(plan, optimizer={"kind": "AdamW", "lr": 1e-2}, device="cpu").fit([(payload, target)], 60)
    assert report.train_loss < 1.5
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Skipping(Body):
    def forward(self, tokens, mask=None):
        first = hidden = self.embedding(tokens)
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden + first, angles=angles, bias=torch.zeros(D))
        return {"logits": hidden}


class Beside(Body):
    def forward(self, tokens, mask=None):
        hidden = first = self.embedding(tokens)
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": self.norm(hidden + first)}


class Gated(Body):
    """Beside the blocks, but through a gate that begins at zero: equal on the first look."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, mask=None):
        hidden = first = self.embedding(tokens)
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": self.norm(hidden) + self.gate * first}


class Twice(Body):
    def forward(self, tokens, mask=None):
        hidden = self.embedding(tokens)
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in (*self.blocks, self.blocks[0]):
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": hidden}


class BothEnds(Body):
    def forward(self, tokens, mask=None):
        hidden = self.norm(self.embedding(tokens))
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": self.norm(hidden)}


@pytest.mark.parametrize("kind", [Beside, Gated])
def test_what_passes_beside_the_blocks_travels(kind):
    """Also where a gate is still closed, so that it does not matter at first."""
    model, given = kind().eval(), sample()
    found = split(model, given)
    assert torch.equal(found.layers.eval()(tuple(given.values())), logits(model(**given)))
    assert [result.part for result in found.layers[0].travel.carried] == ["embedding"]


class WeightsRead(Body):
    """The end uses the weights of a part of the beginning."""

    def forward(self, tokens, mask=None):
        hidden = self.embedding(tokens)
        angles = (torch.zeros(1, 1), torch.zeros(1, D))
        for block in self.blocks:
            hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D))
        return {"logits": hidden @ self.embedding.weight.T}


@pytest.mark.parametrize(
    ("model", "code", "part"),
    [
        (Skipping, "blocks-not-chained", "'blocks.1'"),
        (WeightsRead, "split-changes-output", "its end uses something of its beginning"),
        (Twice, "blocks-out-of-order", "blocks.0, blocks.1, blocks.2, blocks.3, blocks.0"),
        (BothEnds, "part-in-several-stages", "'norm'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "no-block-list", "Sequential"),
    ],
)
def test_what_is_no_chain_is_refused(model, code, part):
    with refused(code, UsageError, part):
        split(model())


def test_a_call_that_differs_from_the_observed_one_is_refused():
    class BatchSizeAsArgument(Body):
        def forward(self, tokens, mask=None):
            hidden = self.embedding(tokens)
            angles = (torch.zeros(1, 1), torch.zeros(1, D))
            for block in self.blocks:
                hidden, _ = block(hidden, angles=angles, bias=torch.zeros(D), scale=float(len(tokens)))
            return {"logits": self.norm(hidden)}

    found = split(BatchSizeAsArgument())
    with refused("block-call-changed", UsageError, "'blocks.0'", "2.0", "3.0"):
        found.layers((torch.zeros(2, T, dtype=torch.int64), torch.ones(2, T, dtype=torch.int64)))
