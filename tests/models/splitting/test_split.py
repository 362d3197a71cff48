"""`dpp.split` on models as people write them: the model's own output and weights, whichever way it takes."""

import pytest
import torch
from torch import nn
from zoo import ZOO, D, Pairs, PatchClassifier, Tagger, V, tokens

import decoupled_pp as dpp
from decoupled_pp.core.device import seeded
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.call import network_output
from kit import refused

# torch's encoder warns of the fast path that it does not take.
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors"
)


def made(name):
    torch.manual_seed(0)
    make, sample = ZOO[name]
    return make(), sample


def payload(sample):
    leaves = tuple(pytree.tree_leaves(sample))
    return leaves if len(leaves) > 1 else leaves[0]


def output(model, sample):
    """NanoGPT gives the logits of all tokens if it is given targets."""
    if type(model).__name__ == "NanoGPT":
        return model(sample, sample)[0]
    args, kwargs = (
        ((), sample) if isinstance(sample, dict) else (sample if isinstance(sample, tuple) else (sample,), {})
    )
    return network_output(model(*args, **kwargs))


@pytest.mark.parametrize("name", ZOO)
def test_gives_the_models_output(name):
    """For micro-batches of other sizes as well, and in a model of the same class that takes the weights."""
    model, sample = made(name)
    found = dpp.split(model, sample(4), 3)
    assert len(found.layers) >= 3
    assert found.state_dict().keys() == model.state_dict().keys()
    again = ZOO[name][0]()
    found.load_into(again)
    found.layers.eval()
    with torch.no_grad():
        for rows in (4, 2, 5):
            given = sample(rows)
            expected = output(model.eval(), given)
            assert torch.equal(found.layers(payload(given)), expected)
            assert torch.equal(output(again.eval(), given), expected)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "layerdrop"])
def test_learns_as_in_one_piece(name):
    """One step of SGD, dropout included: the random numbers are those of the model."""
    whole, sample = made(name)
    parts, _ = made(name)
    layers = dpp.split(parts, sample(4), 3).layers
    dpp.split(whole, sample(4), 3)  # unties
    states = []
    for model, run in ((whole, lambda: output(whole, sample(5))), (parts, lambda: layers(payload(sample(5))))):
        model.train()
        layers.train()
        with seeded(3):
            run().square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        states.append(model.state_dict())
    differ = [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])]
    assert not differ


@pytest.mark.parametrize("name", ["TransformerEncoder, padded", "CLIP tower", "ViT of pairs", "DiT", "nanoGPT"])
def test_splits_at_its_blocks(name):
    model, sample = made(name)
    found = dpp.split(model, sample(4))
    assert found.way == "blocks" and list(found.failed) == ["list", "transformers"]
    assert str(found).startswith("6 layers, blocks; not list: it is no list and no nn.Sequential; not transformers")


def test_the_condition_travels_and_nothing_else():
    model, sample = made("DiT")
    found = dpp.split(model, sample(4))
    assert [result.part for result in found.layers[0].travel.carried] == ["t_embedder", "drop"]
    assert found.layers[0].travel.inputs == (False, True, True)  # of the image the shape is enough


def test_rows_of_several_lengths_travel_padded():
    """Evaluation takes the padding out (nested tensors), training does not; critics see the batch's own length."""
    torch.manual_seed(0)
    model = Tagger()
    found = dpp.split(model, tokens())
    with torch.no_grad():
        hidden, lengths, *_ = found.layers.eval()[0](tokens(3, 6))
    assert hidden.shape == (3, 6, D) and lengths.tolist() == [3, 5, 5]
    hidden, lengths, *_ = found.layers.train()[0](tokens(3, 6))
    assert lengths.numel() == 0
    batches = [(one, torch.where(one == 0, -100, one)) for one in (tokens(4, 8), tokens(3, 6))]
    plan = dpp.partition(found.layers, 3, "uniform", tokens())
    report = dpp.Trainer(plan, critic="head", device="cpu", observer=lambda _: None).fit(batches, 4, validate=batches)
    assert report.train_loss > 0


def test_left_out_blocks_are_the_same_on_all_stages():
    """A block that the entry leaves out is left out; and with what blocks are left out the output is right."""
    model, sample = made("layerdrop")
    found = dpp.split(model, sample(4))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        entry, *others = found.layers.train()
        model.blocks.eval()  # no dropout
        payload = entry(sample(4))
        runs = payload[1]
        for layer in others:
            payload = layer(payload)
        hidden = model.inp(sample(4))
        for block, runs_it in zip(model.blocks, runs, strict=True):
            hidden = block(hidden) if runs_it else hidden
        assert torch.equal(payload, model.out(hidden))
        seen.add(tuple(runs.tolist()))
    assert len(seen) > 2
    model, sample = made("layerdrop")
    plan = dpp.partition(dpp.split(model, sample(4)).layers, 3, "uniform", sample(4))  # nobody has called train() yet
    batches = [(sample(4), torch.tensor([0, 1, 2, 0]))]
    assert dpp.Trainer(plan, critic="head", device="cpu", observer=lambda _: None).fit(batches, 30).train_loss > 0


def test_layers_of_a_sequential_are_taken_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    found = dpp.split(model, torch.ones(3, 4), ["1.0"])
    assert found.way == "list" and not found.failed and found.layers.places == (2,)
    assert list(found.state_dict()) == list(model.state_dict())
    assert dpp.split(list(model), torch.ones(3, 4)).way == "list"


def test_names_of_blocks_are_places_to_cut():
    model, sample = made("TransformerEncoder, plain")
    found = dpp.split(model, sample(4), ["encoder.layers.0", "encoder.layers.2"])
    assert found.way == "blocks" and found.layers.places == (2, 4)
    assert dpp.partition(found.layers, 3, "uniform", payload(sample(4))).boundaries == (0, 2, 4, 6)


def test_what_is_split_in_no_way_says_why():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else x

    with refused("cannot-be-split", dpp.UsageError, "list: it is no list", "blocks: Reads has no nn.ModuleList"):
        dpp.split(Reads(), torch.ones(2, 2))


def test_a_refusal_leaves_the_model_as_it_was():
    class Beyond(nn.Module):
        """The end uses the weights of the beginning: they would belong to two stages."""

        def __init__(self):
            super().__init__()
            self.embedding, self.scale = nn.Embedding(V, D), nn.Parameter(torch.ones(1))
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
            self.blocks[1].bias = self.blocks[0].bias

        def forward(self, ids):
            x = self.embedding(ids) * self.scale
            for block in self.blocks:
                x = block(x)
            return x * self.scale

    model = Beyond()
    with refused("part-in-several-stages", dpp.UsageError, "'scale'"):
        dpp.split_blocks(model, tokens())
    assert model.blocks[1].bias is model.blocks[0].bias


class SharedInTheLoop(Pairs):
    """Each round of the loop uses one module of the holder."""

    def forward(self, x):
        for attention, mlp in self.layers:
            x = self.norm(mlp(attention(x)))
        return x


class ChangedInTheLoop(Pairs):
    """The first module of a round is not given the hidden state."""

    def forward(self, x):
        for attention, mlp in self.layers:
            x = mlp(attention(2 * x)) + x
        return self.norm(x)


@pytest.mark.parametrize("kind", [SharedInTheLoop, ChangedInTheLoop])
def test_groups_that_are_no_chain_are_refused(kind):
    with refused("groups-not-chained"):
        dpp.split_blocks(PatchClassifier(kind()), ZOO["ViT of pairs"][1](4))


def test_options_of_the_samples_size_follow_the_batch():
    torch.manual_seed(0)
    model = ZOO["nanoGPT"][0]().eval()
    found = dpp.split_blocks(model, tokens(), options={"targets": tokens()})
    given = tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(found.layers.eval()(given), model(given, given)[0])


@pytest.mark.parametrize("name", ["segmentation", "U-Net"])
def test_dense_outputs_have_a_critic(name):
    """One convolution, then interpolation to the size of the output; another image size is no obstacle."""
    model, sample = made(name)
    found = dpp.split(model, sample(4), 3)
    plan = dpp.partition(found.layers, 3, "uniform", sample(4))
    trainer = dpp.Trainer(plan, device="cpu", loss="mse", observer=lambda _: None)
    with torch.no_grad():
        shape = output(model, sample(4)).shape
    batches = [(sample(4), torch.zeros(shape))]
    assert trainer.fit(batches, 3).train_loss > 0
    critic = trainer.stages[0].critic
    hidden = torch.ones(2, critic.convolution.in_channels, 8, 8)
    assert critic(hidden).shape == (2, shape[1], *(round(8 * factor) for factor in critic.scale))


def test_weights_leave_under_the_models_names(tmp_path):
    from safetensors.torch import load_file

    from decoupled_pp.run.checkpoints.weights import export_safetensors

    model, sample = made("ViT of pairs")
    found = dpp.split(model, sample(4))
    export_safetensors(found.layers, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
