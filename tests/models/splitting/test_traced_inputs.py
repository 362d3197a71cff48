"""Traced splits of models whose inputs and modules are not those of images: equal to the model in one piece."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree
from kit import refused

# torch's encoder warns of the fast path that it does not take.
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors"
)


class Encoder(nn.Module):
    """torch's encoder with its default dropout, as most tutorials build it."""

    def __init__(self, mask=False, **options):
        super().__init__()
        self.embedding, self.out = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **options), 3)
        self.batch_first = options.get("batch_first", False)
        self.mask = mask

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        if self.mask:
            hidden = self.encoder(hidden, nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]))
        else:
            hidden = self.encoder(hidden, src_key_padding_mask=tokens == 0)
        return self.out(hidden if self.batch_first else hidden.transpose(0, 1))


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        made = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=mask, src_key_padding_mask=source == 0
        )
        return self.out(made)


class SequenceFirst(nn.Module):
    """Towers of CLIP: (length, rows, width) inside, one tower for each input, rows of both in the result."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(8, 16), nn.Embedding(64, 16)
        self.position, self.project = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(16, 4))
        self.images = nn.Sequential(*[Attends(16) for _ in range(2)])
        self.texts = nn.Sequential(*[Attends(16) for _ in range(2)])

    def forward(self, image, text):
        image = self.images((self.image(image) + self.position).permute(1, 0, 2)).permute(1, 0, 2)[:, 0] @ self.project
        text_states = self.texts(self.text(text).permute(1, 0, 2)).permute(1, 0, 2)
        text = text_states[torch.arange(text.shape[0]), text.argmax(-1)] @ self.project
        return F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()


class Attends(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(width, 2, dropout=0.1), nn.LayerNorm(width)

    def forward(self, hidden):
        given = self.norm(hidden)
        return hidden + self.attention(given, given, given, need_weights=False)[0]


class Recurrent(nn.Module):
    """The state of one LSTM starts the next; the first one's is an input."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.LSTM(8, 12, batch_first=True), nn.LSTM(12, 12), nn.Linear(12, 3)

    def forward(self, steps, state):
        hidden, state = self.first(steps, state)
        hidden, _ = self.second(hidden.transpose(0, 1), state)
        return self.out(hidden[-1])


class Graph(nn.Module):
    """Two rounds over a matrix of neighbours, dense or sparse."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Neighbours(6, 8), Neighbours(8, 4)

    def forward(self, nodes, adjacency):
        hidden = F.dropout(torch.relu(self.first(nodes, adjacency)), 0.5, self.training)
        return self.second(hidden, adjacency)


class Neighbours(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, nodes, adjacency):
        return torch.matmul(adjacency, nodes @ self.weight)


class Edges(nn.Module):
    """Messages along a list of edges, between two layers; neither nodes nor edges are a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, nodes, edges):
        source, target = edges
        hidden = self.first(nodes)
        return self.second(torch.relu(hidden.index_add(0, target, hidden[source])))


class Nested(nn.Module):
    """One argument, a dictionary with a tuple in it; blocks take and return dictionaries, and leave themselves out."""

    def __init__(self):
        super().__init__()
        self.blocks, self.out = nn.ModuleList(DictionaryBlock() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, batch):
        scale, shift = batch["pair"]
        state = {"hidden": batch["x"] * scale + shift, "nothing": None}
        for block in self.blocks:
            state = block(state, factor=0.5, kind="plain")
        return self.out(state["hidden"])


class DictionaryBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state, *, factor, kind):
        if kind != "plain" or (self.training and random.random() < 0.5):
            return state
        return {**state, "hidden": torch.relu(self.linear(state["hidden"])) * factor}


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

    def forward(self, x):
        hidden = torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.filter, n=8)
        return self.out(torch.view_as_real(self.second(torch.complex(hidden, x))).sum(-1))


class Conditioned(nn.Module):
    """Blocks with a condition, of the sizes of another input; it also shapes the end."""

    def __init__(self):
        super().__init__()
        self.time, self.enter = nn.Linear(1, 8), nn.Linear(4, 8)
        self.blocks, self.out = nn.ModuleList(ConditionedBlock() for _ in range(3)), nn.Linear(8, 4)

    def forward(self, x, time):
        condition = self.time(time[:, None])
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.out(hidden * condition[:, None])


class ConditionedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulate, self.linear = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden, condition):
        return hidden + self.linear(hidden * self.modulate(condition)[:, None])


class Regions(nn.Module):
    """`autocast` and `no_grad` around the cuts, a buffer that is assigned, rows and steps in one dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        rows, steps, width = x.shape
        with torch.no_grad():
            frozen = self.frozen(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            hidden = self.second(torch.relu(self.first(x.reshape(rows * steps, width))))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().float().mean(0)
        return self.out(hidden.float().view(rows, steps, width) + frozen - self.mean)


def normed(kind):
    return nn.Sequential(kind(nn.Linear(8, 8)), nn.ReLU(), kind(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))


def tokens(rows, length, padding=True):
    made = torch.randint(1, 64, (rows, length))
    if padding:
        made[0, length // 2 :] = 0
    return made


def graph(nodes, sparse=False):
    adjacency = torch.eye(nodes) + (torch.rand(nodes, nodes) < 0.2)
    return torch.randn(nodes, 6), adjacency.to_sparse() if sparse else adjacency


def nested(rows):
    return ({"x": torch.randn(rows, 8), "pair": (torch.randn(rows, 1), torch.randn(rows, 8))},)


def recurrent(rows, steps):
    return torch.randn(rows, steps, 8), (torch.randn(1, rows, 12), torch.randn(1, rows, 12))


CASES = {
    "padding": (lambda: Encoder(batch_first=True), ["encoder.layers.0"], tokens(4, 8), tokens(3, 6)),
    "padding, sequence first": (Encoder, ["encoder.layers.0", "encoder.layers.1"], tokens(4, 8), tokens(3, 6)),
    "mask": (
        lambda: Encoder(mask=True, batch_first=True, norm_first=True),
        ["encoder.layers.1"],
        tokens(4, 8, False),
        tokens(3, 6, False),
    ),
    "encoder and decoder": (
        EncoderDecoder,
        ["transformer.encoder.layers.0", "transformer.encoder", "transformer.decoder.layers.0"],
        (tokens(4, 8), tokens(4, 6, False)),
        (tokens(3, 7), tokens(3, 5, False)),
    ),
    "two sequence-first towers": (
        SequenceFirst,
        ["images.0", "images", "texts.0"],
        (torch.randn(4, 5, 8), tokens(4, 6)),
        (torch.randn(3, 5, 8), tokens(3, 7)),
    ),
    "LSTM and its state": (Recurrent, ["first"], recurrent(4, 5), recurrent(3, 7)),
    "dense adjacency": (Graph, ["first"], graph(12), graph(9)),
    "sparse adjacency": (Graph, ["first"], graph(12, True), graph(9, True)),
    "edges": (
        Edges,
        ["first"],
        (torch.randn(12, 6), torch.randint(0, 12, (2, 30))),
        (torch.randn(9, 6), torch.randint(0, 9, (2, 17))),
    ),
    "nested dictionary": (Nested, ["blocks.0", "blocks.1"], nested(4), nested(3)),
    "complex": (Complex, ["first", "second"], torch.randn(4, 8), torch.randn(3, 8)),
    "condition": (
        Conditioned,
        ["blocks.0", "blocks.1"],
        (torch.randn(4, 6, 4), torch.rand(4)),
        (torch.randn(3, 5, 4), torch.rand(3)),
    ),
    "regions": (Regions, ["first", "second"], torch.randn(4, 5, 8), torch.randn(3, 6, 8)),
    "one sample": (Regions, ["first"], torch.randn(1, 5, 8), torch.randn(3, 5, 8)),
    "weight norm": (lambda: normed(weight_norm), ["0", "2"], torch.randn(4, 8), torch.randn(3, 8)),
    "spectral norm": (lambda: normed(spectral_norm), ["0", "2"], torch.randn(4, 8), torch.randn(3, 8)),
}


def call(model, sample):
    return (
        model(**sample) if isinstance(sample, dict) else model(*sample) if isinstance(sample, tuple) else model(sample)
    )


def payload(sample):
    leaves = tuple(pytree.tree_leaves(sample))
    return leaves if len(leaves) > 1 else leaves[0]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_two_steps_are_the_models(name):
    """In evaluation for two sizes, in training with the same random numbers; weights under the model's own names."""
    make, cuts, sample, other = CASES[name]
    torch.manual_seed(0)
    whole, parts = make(), make()
    parts.load_state_dict(whole.state_dict())
    found = dpp.split_traced(parts, sample, cuts)
    for given in (sample, other):
        assert torch.equal(found.layers.eval()(payload(given)), call(whole.eval(), given))
    for given in (sample, other):
        outputs = []
        for run in (lambda given: call(whole.train(), given), lambda given: found.layers.train()(payload(given))):
            torch.manual_seed(1)
            random.seed(1)
            outputs.append(run(given))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for model in (whole, found.layers):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer.step()
            optimizer.zero_grad()
    state = found.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in whole.state_dict().items())
    again = make()
    found.load_into(again)
    assert torch.equal(call(again.eval(), other), call(whole.eval(), other))


def test_lazy_weights_are_those_of_a_first_run():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(8), nn.LazyLinear(3))

    x = torch.randn(4, 6)
    whole, parts = make(), make()
    with torch.no_grad():
        torch.manual_seed(1)
        whole.eval()(x)
    torch.manual_seed(1)
    found = dpp.split_traced(parts, x, ["1", "3"])
    assert torch.equal(found.layers.eval()(x[:3]), whole(x[:3]))


class Table(nn.Module):
    """A tensor that is a plain attribute, and one module under two names, of which the second is called."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(0, 1, 8)
        self.first, self.out, self.idle = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        self.alias = self.first

    def forward(self, x):
        return self.out(self.alias(x + self.table) * self.table)


def test_the_state_is_the_models_own():
    model = Table()
    found = dpp.split_traced(model, torch.randn(4, 8), ["alias"])
    assert found.state_dict().keys() == model.state_dict().keys()
    Table().load_state_dict(found.state_dict())
    with refused("weights-of-another-model", UsageError, "Linear"):
        found.load_into(nn.Linear(2, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


def test_tied_weights_become_two():
    model = Tied()
    found = dpp.split_traced(model, torch.randint(0, 20, (4, 6)), ["block"])
    assert found.untied == {"head.weight": "embedding.weight"}
    assert list(found.layers.tied.items()) == [("part1.part.model.head.weight", "part0.part.model.embedding.weight")]
    found.load_into(Tied())  # equal as yet
    with torch.no_grad():
        model.head.weight.add_(1)
    with refused("weights-tied-in-model", UsageError, "head.weight"):
        found.load_into(Tied())


class Fixed(nn.Module):
    """Takes batches of any size; the length decides what it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.out(hidden * 2 if x.shape[1] > 6 else hidden)


def test_sizes_that_the_trace_does_not_hold_for_are_refused():
    model = Fixed().eval()
    layers = dpp.split_traced(model, torch.randn(4, 9, 8), ["first"]).layers
    given = torch.randn(3, 8, 8)
    assert torch.equal(layers(given), model(given))
    with refused("size-unlike-trace", UsageError, "input[0] has size 5 in dimension 1"):
        layers(torch.randn(3, 5, 8))


def test_trains_in_stages_with_lengths_that_vary():
    torch.manual_seed(0)
    model = Encoder(batch_first=True)
    layers = dpp.split_traced(model, tokens(4, 8), ["encoder.layers.0", "encoder.layers.1"]).layers
    batches = [(given, torch.where(given == 0, -100, given)) for given in (tokens(4, 8), tokens(3, 6))]
    trainer = dpp.Trainer(dpp.partition(layers, 3, "uniform", batches[0][0]), critic="head", device="cpu")
    assert trainer.fit(batches, steps=40, validate=batches).train_loss < 4.1
    given = batches[1][0]
    with torch.no_grad():
        torch.testing.assert_close(layers.eval()(given), model.eval()(given))
