"""A baseline trains from the same settings, data and order, and leaves what a decoupled run leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from decoupled_pp.commands.main import main
from decoupled_pp.training.baselines import BASELINES
from ranks import launch

SETTINGS = {
    "stages": 2,
    "cut": "parameters",
    "threads": 1,
    "device": "cpu",
    "model": {"kind": "mlp", "width": 16, "depth": 4},
    "data": {"kind": "factory", "factory": "kit:points", "batch_size": 32},
    "optimizer": {"kind": "SGD", "lr": 0.1, "arguments": {"momentum": 0.9}},
    "training": {"steps": 6, "accumulate": 4, "clip_norm": 1.0},
    "validation": {"every": 3},
    "schedule": {"kind": "cosine", "warmup": 2},
    "logging": {"every": 4, "tensorboard": False},
}


def _train(folder, strategy, **sections):
    """Run `dpp train` in this process or rank; the run folder."""
    os.chdir(folder)
    file = Path(f"{strategy}-{os.environ.get('RANK', '0')}.yaml")
    file.write_text(yaml.safe_dump({**SETTINGS, "name": strategy, **sections}))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), f"--strategy={strategy}"])
    assert not ended.value.code
    return str(Path("runs", strategy).resolve())


def _files(folder):
    folder = Path(folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), records, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    here = Path.cwd()
    try:
        return _files(_train(folder, "backprop"))
    finally:
        os.chdir(here)


@pytest.mark.parametrize("strategy", [kind for kind in BASELINES if kind != "backprop"])
def test_it_learns_what_plain_backprop_learns(strategy, plain, tmp_path):
    results = launch(_train, str(tmp_path), strategy, size=2, folder=tmp_path / "logs")
    summary, records, weights = _files(results[0].value)
    _, expected_records, expected_weights = plain
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
    scores = [[r["loss"], r["samples"]] for r in records if r["kind"] == "validation"]
    assert len(scores) == 2
    wanted = [[r["loss"], r["samples"]] for r in expected_records if r["kind"] == "validation"]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert summary["strategy"] == strategy and summary["ranks"] == 2 and summary["steps"] == 6
    assert {row["stage"] for row in summary["per_stage"]} == {0, 1}
    assert all(row["saved_activation_bytes_peak"] > 0 for row in summary["per_stage"])
    assert summary["training_seconds"] < summary["seconds"]


def test_it_leaves_the_same_files_and_keys(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary, records, _ = plain
    mine, own_records, _ = _files(_train(tmp_path, "decoupled"))
    assert set(summary) == set(mine)
    assert set(summary["per_stage"][0]) == set(mine["per_stage"][0])
    kinds = {record["kind"]: set(record) for record in records}
    assert kinds == {record["kind"]: set(record) for record in own_records if record["kind"] != "checkpoint"}


def test_traffic_of_a_pipeline_is_as_large_backward_as_forward(tmp_path):
    results = launch(_train, str(tmp_path), "1f1b", size=2, folder=tmp_path / "logs")
    (link,) = _files(results[0].value)[0]["links"]
    assert (link["from"], link["to"], link["packets"]) == (0, 1, 24)
    assert link["payload_bytes_forward"] == link["payload_bytes_backward"] == 24 * 32 * 16 * 4
