"""Models that are no chain in Python, cut through `torch.export`: skip connections cross the cuts."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from kit import refused


class Residual(nn.Module):
    """A basic block as in torchvision: activations are called, not listed."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, image):
        kept = image if self.downsample is None else self.downsample(image)
        hidden = self.relu(self.bn1(self.conv1(image)))
        return self.relu(self.bn2(self.conv2(hidden)) + kept)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, image):
        hidden = self.pool(F.relu(self.bn1(self.conv1(image))))
        hidden = self.avgpool(self.layer2(self.layer1(hidden)))
        return self.fc(hidden.view(hidden.size(0), -1))


class UNet(nn.Module):
    """Two levels; both skip connections cross cuts."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down1 = nn.Conv2d(8, 12, 3, 2, 1)
        self.down2 = nn.Conv2d(12, 16, 3, 2, 1)
        self.drop = nn.Dropout(0.3)
        self.up1 = nn.ConvTranspose2d(16, 12, 2, 2)
        self.up2 = nn.ConvTranspose2d(24, 8, 2, 2)
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, image):
        first = F.relu(self.enter(image))
        second = F.relu(self.down1(first))
        deep = self.drop(F.relu(self.down2(second)))
        hidden = torch.cat([F.relu(self.up1(deep)), second], 1)
        hidden = torch.cat([F.relu(self.up2(hidden)), first], 1)
        return self.out(hidden).mean((2, 3))


class Inception(nn.Module):
    """Two blocks of branches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed1 = Branches(8)
        self.mixed2 = Branches(24)
        self.fc = nn.Linear(72, 5)

    def forward(self, image):
        hidden = self.mixed2(self.mixed1(F.relu(self.stem(image))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(hidden, 1), 1))


class Branches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.three = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, width, 1))

    def forward(self, image):
        return F.relu(torch.cat([self.one(image), self.three(image), self.pooled(image)], 1))


MODELS = {
    "resnet": (ResNet, ["bn1", "layer1", "layer2.0"]),
    "unet": (UNet, ["down1", "down2", "up1"]),
    "inception": (Inception, ["stem", "mixed1"]),
    "inside": (Inception, ["mixed1.one", "mixed2.three"]),
}
IMAGES = torch.randn(4, 3, 16, 16)


@pytest.fixture(params=MODELS)
def case(request):
    make, names = MODELS[request.param]
    torch.manual_seed(0)
    return make, names


def test_gives_the_models_output_for_any_batch(case):
    make, names = case
    model = make().eval()
    layers = dpp.split_traced(model, IMAGES, names).layers.eval()
    for rows in (1, 4, 6):
        images = torch.randn(rows, 3, 16, 16)
        assert torch.equal(layers(images), model(images))
    assert {id(p) for p in layers.parameters()} == {id(p) for p in model.parameters()}


def test_learns_as_in_one_piece(case):
    """One step of SGD, batch statistics included."""
    make, names = case
    whole, parts = make(), make()
    parts.load_state_dict(whole.state_dict())
    found = dpp.split_traced(parts, IMAGES, names)
    for model, run in ((whole, whole), (parts, found.layers)):
        for part in (*model.modules(), *run.modules()):
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
        run.train()(IMAGES).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    state = found.layers.state_dict()
    assert set(found.names.values()) == set(whole.state_dict())
    assert all(torch.equal(state[key], whole.state_dict()[name]) for key, name in found.names.items())


def test_dropout_and_batch_statistics_follow_the_mode():
    layers = dpp.split_traced(UNet(), IMAGES, ["down1", "down2"]).layers
    layers.eval()
    before = {key: value.clone() for key, value in layers.state_dict().items()}
    assert torch.equal(layers(IMAGES), layers(IMAGES))
    assert all(torch.equal(before[key], value) for key, value in layers.state_dict().items())
    layers.train()
    assert not torch.equal(layers(IMAGES), layers(IMAGES))
    assert any(not torch.equal(before[key], value) for key, value in layers.state_dict().items())


class StochasticDepth(nn.Module):
    """Leaves samples out in training, as EfficientNets and ConvNeXts do; nothing in evaluation."""

    def forward(self, image):
        if not self.training:
            return image
        return image * torch.empty(image.shape[0], 1, 1, 1, device=image.device).bernoulli_(0.5)


class NormAct(nn.BatchNorm2d):
    """Batch normalisation by the function, with an activation inside, as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, image):
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(image, *statistics, self.training, self.momentum, self.eps))


class Moody(nn.Module):
    """Modules of one's own that ask in which mode they are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.enter, self.norm, self.drop = nn.Conv2d(3, 8, 3, padding=1), NormAct(8), StochasticDepth()
        self.conv, self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), NormAct(8), nn.Linear(8, 5)

    def forward(self, image):
        hidden = self.norm(self.enter(image * self.scale))
        hidden = hidden + self.drop(self.last(self.conv(hidden)))
        return self.fc(hidden.mean((2, 3)))


def test_modules_that_ask_for_their_mode_stay_as_they_are():
    """In training they draw the same numbers and keep the same statistics as in one piece."""
    torch.manual_seed(0)
    whole, parts = Moody(), Moody()
    parts.load_state_dict(whole.state_dict())
    found = dpp.split_traced(parts, IMAGES, ["norm", "conv"])
    for run in (whole, found.layers):
        torch.manual_seed(1)
        run.train()(IMAGES).square().sum().backward()
        torch.optim.SGD(run.parameters(), lr=0.1).step()
    state = found.layers.state_dict()
    assert all(torch.equal(state[key], whole.state_dict()[name]) for key, name in found.names.items())
    assert set(found.names.values()) == set(whole.state_dict())
    assert torch.equal(found.layers.eval()(IMAGES[:3]), whole.eval()(IMAGES[:3]))
    assert not torch.equal(found.layers.train()(IMAGES), found.layers.train()(IMAGES))


def test_skip_connections_travel(case):
    """A U-Net's first cut carries the result and both skips that are open there."""
    layers = dpp.split_traced(UNet(), IMAGES, ["down1", "down2", "up1"]).layers.eval()
    assert [tuple(t.shape[1:]) for t in layers[0](IMAGES)] == [(12, 8, 8), (8, 16, 16)]
    assert [tuple(t.shape[1:]) for t in layers[1](layers[0](IMAGES))] == [(16, 4, 4), (12, 8, 8), (8, 16, 16)]


def test_trains_in_stages():
    torch.manual_seed(0)
    layers = dpp.split_traced(UNet(), IMAGES, ["down1", "down2", "up1"]).layers
    trainer = dpp.Trainer(
        dpp.partition(layers, 4, "uniform", IMAGES), device="cpu", optimizer={"kind": "Adam", "lr": 1e-2}
    )
    assert trainer.fit([(IMAGES, torch.tensor([0, 1, 2, 3]))], steps=60).train_loss < 0.7


class RunsTwice(ResNet):
    def forward(self, image):
        return super().forward(image) + self.layer1[1](self.conv1(image)).mean()


class FunctionalDropout(ResNet):
    def forward(self, image):
        return F.dropout(super().forward(image), 0.5, self.training)


class Branching(ResNet):
    def forward(self, image):
        return super().forward(image if image.sum() > 0 else -image)


class DropPath(ResNet):
    def forward(self, image):
        return super().forward(image * 2 if self.training else image)


class Mixed(nn.Module):
    def forward(self, image, other):
        return image + other if self.training else image


class TwoInputs(ResNet):
    def __init__(self):
        super().__init__()
        self.mixed = Mixed()

    def forward(self, image):
        return super().forward(self.mixed(image, image * 2))


class Frozen(ResNet):
    def forward(self, image):
        with torch.no_grad():
            image = self.conv1(image)[:, :3]
        return super().forward(image)


class Scale(nn.Module):
    def forward(self, image, share=1.0):
        return image * torch.rand(len(image), 1, 1, 1) * share if self.training else image


class GivenAFlag(ResNet):
    """A module that asks for its mode is given a number, which no trace of it tells."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, image):
        return super().forward(self.scale(image, share=0.5))


class ScaledInTraining(ResNet):
    """The operators are the same in both modes, a number is not; the gate hides it from any output."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, image):
        return super().forward(image + self.gate * image * (0.5 if self.training else 1.0))


class Idle(ResNet):
    def __init__(self):
        super().__init__()
        self.idle = nn.Identity()

    def forward(self, image):
        return super().forward(self.idle(image))


class LengthOfBatch(ResNet):
    def forward(self, image):
        return super().forward(image) / len(image)


class PythonLayerDrop(ResNet):
    """Leaves a layer out at random, by Python's generator."""

    def forward(self, image):
        hidden = self.bn1(self.conv1(image))
        if not self.training or random.random() < 0.9:
            hidden = self.layer1(hidden)
        return self.fc(self.avgpool(self.layer2(hidden)).flatten(1))


class TorchLayerDrop(ResNet):
    """Leaves a layer out at random, by torch's generator, as wav2vec2."""

    def forward(self, image):
        hidden = self.bn1(self.conv1(image))
        if not (self.training and torch.rand([]) < 0.1):
            hidden = self.layer1(hidden)
        return self.fc(self.avgpool(self.layer2(hidden)).flatten(1))


class Remembers(ResNet):
    """Keeps a tensor in a plain attribute from call to call."""

    last = 0

    def forward(self, image):
        result = super().forward(image) + self.last
        self.last = result.mean()
        return result


@pytest.mark.parametrize(
    ("model", "names", "code", "part"),
    [
        (ResNet, ["layer9"], "bad-cut-point", "'layer9'"),
        (RunsTwice, ["layer1.1"], "bad-cut-point", "'layer1.1' ends 2 times"),
        (LengthOfBatch, ["layer1"], "batch-size-fixed-by-trace", "4 samples only"),
        (PythonLayerDrop, ["layer1"], "mode-fixed-by-trace", "the code of PythonLayerDrop draws"),
        (Remembers, ["layer1"], "state-lost-by-trace", "'last'"),
    ],
)
def test_what_cannot_be_traced_is_named(model, names, code, part):
    with refused(code, UsageError, part):
        dpp.split_traced(model(), IMAGES, names)


@pytest.mark.parametrize(("model", "mode"), [(Branching, "training"), (TorchLayerDrop, "training")])
def test_what_the_tracer_refuses_is_named(model, mode):
    with pytest.raises(UsageError, match=f"the code of {model.__name__} cannot be traced in {mode}") as caught:
        dpp.split_traced(model(), IMAGES, ["layer1"])  # the rest of the text is torch's own
    assert caught.value.code == "not-traceable"


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (FunctionalDropout, ["layer1"]),
        (DropPath, ["layer1"]),
        (TwoInputs, ["layer1"]),
        (GivenAFlag, ["layer1"]),
        (ScaledInTraining, ["layer1"]),
        (Idle, ["idle", "layer1"]),
        (Frozen, ["layer1"]),
    ],
)
def test_code_around_the_cuts_follows_the_mode(model, names):
    """Loss, gradients, random numbers and statistics are those of the model in one piece, in both modes."""
    torch.manual_seed(0)
    whole, parts = model(), model()
    parts.load_state_dict(whole.state_dict())
    found = dpp.split_traced(parts, IMAGES, names)
    outputs = []
    for run in (whole, found.layers):
        torch.manual_seed(1)
        outputs += [run.train()(IMAGES)]
        outputs[-1].square().sum().backward()
        torch.optim.SGD(run.parameters(), lr=0.1).step()
        outputs += [run.eval()(IMAGES[:3])]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert all(torch.equal(found.state_dict()[name], value) for name, value in whole.state_dict().items())


class Tokens(nn.Module):
    """A class token, positions and attention: sizes of the batch everywhere; one layer used twice."""

    def __init__(self):
        super().__init__()
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Embedding(300, 8)
        self.embed, self.shared = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, image):
        patches = self.embed(image).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], 1) + torch.zeros(image.shape[0], 1, 8)
        hidden = hidden + self.position(torch.arange(hidden.shape[1], device=image.device))
        hidden = self.shared(torch.relu(self.shared(hidden)))
        return self.out(self.attention(hidden, hidden, hidden, need_weights=False)[0][:, 0])


def test_sizes_of_the_batch_and_layers_used_twice():
    whole, parts = Tokens(), Tokens()
    parts.load_state_dict(whole.state_dict())
    found = dpp.split_traced(parts, IMAGES, ["position"])
    for rows in (1, 4, 6):
        images = torch.randn(rows, 3, 16, 16)
        torch.testing.assert_close(found.layers.eval()(images), whole.eval()(images))  # attention has a fused kernel
    assert set(found.names.values()) == set(whole.state_dict())
    for run in (whole, found.layers):
        run.train()(IMAGES).square().sum().backward()
    theirs = dict(whole.named_parameters())
    assert all(torch.equal(p.grad, theirs[name].grad) for name, p in parts.named_parameters())


def test_dictionaries_go_in_and_out():
    class Named(ResNet):
        def forward(self, image, *, scale):
            return {"logits": super().forward(image) * scale, "other": image}

    model = Named().eval()
    sample = {"image": IMAGES, "scale": torch.rand(4, 1)}
    layers = dpp.split_traced(model, sample, ["layer1"], output=lambda result: result["logits"]).layers
    assert torch.equal(layers.eval()(tuple(sample.values())), model(**sample)["logits"])
