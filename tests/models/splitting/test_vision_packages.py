"""Networks of torchvision and timm, where these packages are installed, traced as they are into four parts."""

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from kit import ignore

try:
    import timm
    from torchvision import models
except Exception as error:  # not there, or built for another torch
    pytest.skip(f"torchvision and timm cannot be imported: {error}", allow_module_level=True)

SMALL = {"num_classes": 10}
NETWORKS = {
    "torchvision resnet50": (models.resnet50, SMALL, ["layer1", "layer2", "layer3.2"], 64),
    "torchvision vgg11_bn": (models.vgg11_bn, SMALL, ["features.7", "features.14", "features.28"], 64),
    "torchvision densenet121": (
        models.densenet121,
        SMALL,
        ["features.transition1", "features.transition2", "features.transition3"],
        64,
    ),
    "torchvision mobilenet_v3_small": (
        models.mobilenet_v3_small,
        SMALL,
        ["features.3", "features.6", "features.9"],
        64,
    ),
    "torchvision efficientnet_b0": (models.efficientnet_b0, SMALL, ["features.2", "features.4", "features.6"], 64),
    "torchvision convnext_tiny": (models.convnext_tiny, SMALL, ["features.1", "features.3", "features.5.4"], 64),
    "torchvision regnet_y_400mf": (
        models.regnet_y_400mf,
        SMALL,
        ["trunk_output.block1", "trunk_output.block2", "trunk_output.block3"],
        64,
    ),
    "torchvision googlenet": (
        models.googlenet,
        SMALL | {"aux_logits": False, "init_weights": False},
        ["inception3b", "inception4b", "inception4e"],
        64,
    ),
    "torchvision VisionTransformer": (
        models.vision_transformer.VisionTransformer,
        SMALL | {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96},
        [f"encoder.layers.encoder_layer_{n}" for n in range(3)],
        32,
    ),
    "torchvision swin_t": (models.swin_t, SMALL, ["features.1", "features.3", "features.5"], 64),
    "timm resnet18": ("resnet18", SMALL, ["layer1", "layer2", "layer3"], 64),
    "timm vit_tiny": (
        "vit_tiny_patch16_224",
        SMALL | {"img_size": 64, "depth": 4},
        [f"blocks.{n}" for n in range(3)],
        64,
    ),
    "timm deit_tiny_distilled": (
        "deit_tiny_distilled_patch16_224",
        SMALL | {"img_size": 64, "depth": 4},
        [f"blocks.{n}" for n in range(3)],
        64,
    ),
    "timm efficientnet_lite0": ("efficientnet_lite0", SMALL, ["blocks.1", "blocks.3", "blocks.5"], 64),
    "timm convnext_atto": ("convnext_atto", SMALL, ["stages.0", "stages.1", "stages.2"], 64),
    "timm mixer_s32": ("mixer_s32_224", SMALL | {"img_size": 64}, ["blocks.1", "blocks.3", "blocks.5"], 64),
    "timm swin_tiny": (
        "swin_tiny_patch4_window7_224",
        SMALL | {"img_size": 56},
        ["layers.0", "layers.1", "layers.2"],
        56,
    ),
    "timm regnety_002": ("regnety_002", SMALL, ["s1", "s2", "s3"], 64),
}


def network(name):
    make, arguments, cuts, size = NETWORKS[name]
    torch.manual_seed(0)
    made = timm.create_model(make, **arguments) if isinstance(make, str) else make(**arguments)
    return made, cuts, torch.randn(4, 3, size, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_one_training_step_are_the_models_own(name):
    (whole, cuts, images), (parts, *_) = network(name), network(name)
    found = dpp.split_traced(parts, images, cuts)
    for run in (whole, found.layers):
        torch.manual_seed(1)
        run.train()(images).square().sum().backward()
        torch.optim.SGD(run.parameters(), lr=1e-3).step()
    state = found.layers.state_dict()
    assert len(found.layers) == 4 and set(found.names.values()) == set(whole.state_dict())
    assert [name for key, name in found.names.items() if not torch.equal(state[key], whole.state_dict()[name])] == []
    with torch.no_grad():
        assert torch.equal(found.layers.eval()(images[:3]), whole.eval()(images[:3]))


@pytest.mark.parametrize("name", ["torchvision efficientnet_b0", "timm efficientnet_lite0"])
def test_trains_in_four_stages(name):
    model, cuts, images = network(name)
    plan = dpp.partition(dpp.split_traced(model, images, cuts).layers, 4, "uniform", images)
    trainer = dpp.Trainer(plan, optimizer={"kind": "SGD", "lr": 0.01}, observer=ignore, device="cpu")
    report = trainer.fit([(images, torch.tensor([0, 1, 2, 3]))], 2)
    assert report.steps == 2 and isinstance(trainer.export(), nn.Module)
