"""Law 8: export == the staged forward; the exported thing is the user's plain module under the user's own names."""

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.run.checkpoints.weights import export_safetensors
from kit import differences, ignore
from ranks import launch, values


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_export_computes_what_the_stages_compute(case, stages):
    trainer = _trained(case, stages)
    exported = trainer.export()

    assert torch.equal(_output(exported, case), _staged(trainer, case))


def test_export_is_the_users_own_module():
    case = CASES["resnet"]
    network = case.network()
    names = list(network.state_dict())
    inputs = case.batches(1)[0][0]
    trainer = Trainer(partition(network, 3, "uniform", inputs), device="cpu", observer=ignore)
    trainer.fit(case.batches(3), 2)
    exported = trainer.export()

    assert exported is network
    assert type(exported) is nn.Sequential
    assert list(exported.state_dict()) == names


def test_a_list_of_layers_too():
    layers = [nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3)]
    case = CASES["mlp"]
    plan = partition(layers, 2, [2, 1], case.batches(1)[0][0])
    trainer = Trainer(plan, device="cpu", observer=ignore)
    trainer.fit(case.batches(4), 4)
    exported = trainer.export()

    assert list(exported.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert exported[0] is layers[0]
    assert torch.equal(_output(exported, "mlp"), _staged(trainer, "mlp"))


def test_every_rank_exports_all_weights(tmp_path):
    here = {name: tensor.clone() for name, tensor in _trained("resnet", 2).export().state_dict().items()}
    for there in values(launch(_exported_weights, "resnet", size=2, folder=tmp_path)):
        assert differences(here, there) == []


def test_through_a_safetensors_file_into_a_fresh_module(tmp_path):
    trainer = _trained("gpt", 3)
    export_safetensors(trainer.export(), tmp_path / "model.safetensors")

    fresh = CASES["gpt"].network()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)

    assert torch.equal(_output(fresh, "gpt"), _staged(trainer, "gpt"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def _trained(case, stages):
    trainer = CASES[case].trainer(stages)
    trainer.fit(CASES[case].batches(4), 4)
    return trainer


def _exported_weights(case):
    return dict(_trained(case, 2).export().state_dict())


@torch.no_grad()
def _output(module, case):
    return module.eval()(CASES[case].batches(1)[0][0])


@torch.no_grad()
def _staged(trainer, case):
    payload = CASES[case].batches(1)[0][0]
    for stage in trainer.stages:
        payload = stage.trunk.eval()(payload)
    return payload
