"""Exits of a trained run: costs by hand, leaving early, all together, a smaller plain network, gradients."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp import Trainer, partition
from decoupled_pp.commands.evaluate.exits import ensemble, exit_costs, progressive
from decoupled_pp.commands.evaluate.finished_run import evaluate_run, exit_module
from decoupled_pp.commands.evaluate.gradient_probe import gradient_cosines
from decoupled_pp.core.errors import UsageError
from kit import ignore, refused, run_dpp, tanh_layers, vector_batches

CLASSES, WIDTH, BATCHES = 3, 6, 5


def batches():
    """Classes that can be learnt."""
    return [(inputs, inputs[:, :CLASSES].argmax(1)) for inputs, _ in vector_batches(BATCHES, 8, WIDTH, CLASSES)]


@pytest.fixture(scope="module")
def trained():
    """Three stages: two linear layers with a tanh, a linear head."""
    torch.manual_seed(1)
    layers = tanh_layers(2, WIDTH)
    plan = partition([*layers, nn.Linear(WIDTH, CLASSES)], 3, [1, 1, 1], batches()[0][0])
    trainer = Trainer(plan, device="cpu", observer=ignore, optimizer={"kind": "AdamW", "lr": 0.02})
    trainer.fit(batches(), 40)
    return trainer


def logits_of(trainer):
    """[(exits, B, classes), target] by hand."""
    found = []
    with torch.no_grad():
        for inputs, target in batches():
            hidden, rows = inputs, []
            for stage in trainer.stages:
                hidden = stage.trunk(hidden)
                rows.append(stage.critic(hidden) if stage.critic is not None else hidden)
            found.append((torch.stack(rows), target))
    return found


def test_costs_by_hand(trained):
    costs = exit_costs(trained.stages, batches()[0][0])
    layer, head = 2 * WIDTH * WIDTH, 2 * WIDTH * CLASSES
    assert [cost.flops for cost in costs] == [layer + head, 2 * layer + head, 2 * layer + head]
    assert [cost.tried for cost in costs] == [layer + head, 2 * layer + 2 * head, 2 * layer + 3 * head]
    block, linear = WIDTH * WIDTH + WIDTH, WIDTH * CLASSES + CLASSES
    assert [cost.parameters for cost in costs] == [block + linear, 2 * block + linear, 2 * block + linear]


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.9])
def test_leaving_early_by_hand(threshold, trained):
    costs = exit_costs(trained.stages, batches()[0][0])
    (found,) = progressive(trained.stages, batches(), costs, [threshold])
    right, flops, left = 0, 0.0, [0, 0, 0]
    for logits, target in logits_of(trained):
        for b, wanted in enumerate(target):
            chances = logits[:, b].softmax(-1)
            exit_ = next((k for k in range(2) if chances[k].max() > threshold), 2)
            left[exit_] += 1
            right += int(chances[exit_].argmax() == wanted)
            flops += costs[exit_].tried
    count = 8 * BATCHES
    assert found.accuracy == pytest.approx(right / count)
    assert found.flops == pytest.approx(flops / count)
    assert found.left == pytest.approx([n / count for n in left])
    assert found.share_of_flops == pytest.approx(flops / count / costs[-1].flops)


def test_all_together_by_hand(trained):
    found = ensemble(trained.stages, batches())
    summed = torch.cat([logits.sum(0) for logits, _ in logits_of(trained)])
    targets = torch.cat([target for _, target in batches()])
    assert found.loss == pytest.approx(F.cross_entropy(summed, targets).item(), rel=1e-5)
    assert found.accuracy == pytest.approx((summed.argmax(1) == targets).float().mean().item())


def test_nothing_is_left_in_evaluation_mode(trained):
    before = [part.training for stage in trained.stages for part in stage.trunk.modules()]
    ensemble(trained.stages, batches())
    gradient_cosines(trained.plan.module, trained.stages, batches()[:1])
    assert (
        [part.training for stage in trained.stages for part in stage.trunk.modules()] == before == [True] * len(before)
    )


def test_gradients_by_hand(trained):
    found = gradient_cosines(trained.plan.module, trained.stages, batches()[:1])
    inputs, target = batches()[0]
    whole = F.cross_entropy(trained.plan.module(inputs), target)
    hidden = inputs
    for stage, one in zip(trained.stages, found, strict=True):
        parameters = list(stage.trunk.parameters())
        output = stage.trunk(hidden)
        local = F.cross_entropy(stage.critic(output) if stage.critic is not None else output, target)
        ours = torch.cat([g.flatten() for g in torch.autograd.grad(local, parameters)])
        theirs = torch.cat([g.flatten() for g in torch.autograd.grad(whole, parameters, retain_graph=True)])
        assert one.mean == pytest.approx(F.cosine_similarity(ours, theirs, dim=0).item(), abs=1e-5)
        assert one.norm_ratio == pytest.approx((ours.norm() / theirs.norm()).item(), rel=1e-4)
        hidden = output.detach()
    assert found[-1].mean == pytest.approx(1) and found[-1].norm_ratio == pytest.approx(1)
    assert found[0].mean < 0.999


def test_confidences_and_tokens_are_checked(trained):
    costs = exit_costs(trained.stages, batches()[0][0])
    with refused("option-out-of-range", UsageError, "--progressive 1.5"):
        progressive(trained.stages, batches(), costs, [0.5, 1.5])
    with refused("progressive-needs-classes"):
        progressive(trained.stages, [(x, torch.randn(8, CLASSES)) for x, _ in batches()], costs, [0.5])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the command line, three stages."""
    root = tmp_path_factory.mktemp("run")
    config = root / "tiny.yaml"
    config.write_text(
        f"name: tiny\nruns: {root}\nstages: 3\nmodel: {{kind: mlp, width: 16, depth: 4}}\n"
        "data: {kind: digits, batch_size: 64}\ntraining: {steps: 60}\nthreads: 1\nlogging: {tensorboard: false}\n"
    )
    assert run_dpp("train", config) == 0
    return root / "tiny"


def test_the_command_says_it_all(run, capsys, tmp_path):
    picture = tmp_path / "exits.png"
    options = ["--progressive=0.5,0.9", "--ensemble", "--gradient-probe=2", "--picture", picture]
    options += ["--json", tmp_path / "exits.json"]
    assert run_dpp("evaluate", run, *options) == 0
    text = capsys.readouterr().out
    for part in (
        "MFLOPs/sample",
        "confidence",
        "0.5",
        "ensemble of all exits",
        "cosine of local and true",
        str(picture),
    ):
        assert part in text
    written = json.loads((tmp_path / "exits.json").read_text())
    assert len(written["exits"]) == len(written["costs"]) == 3 and written["progressive"][1]["threshold"] == 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_input(run):
    with refused("option-unreadable", UsageError, "--progressive high"):
        run_dpp("evaluate", str(run), "--progressive=high")
    with refused("option-out-of-range", UsageError, "--gradient-probe -1"):
        run_dpp("evaluate", str(run), "--gradient-probe=-1")
    with refused("unknown-exit", UsageError, "has exits 0 to 2"):
        run_dpp("export", str(run), "--exit=3", "-o", str(run / "x.safetensors"))
    with refused("options-contradict", UsageError, "--tied"):
        run_dpp("export", str(run), "--exit=1", "--tied", "-o", str(run / "x.safetensors"))
    with refused("tied-needs-transformers-folder"):
        run_dpp("export", str(run), "--tied", "-o", str(run / "x.safetensors"))
    with refused("not-a-run-folder"):
        run_dpp("evaluate", str(run.parent))


def test_a_smaller_network_is_the_exit(run, tmp_path, capsys):
    from safetensors.torch import load_file

    assert run_dpp("export", run, "--exit=1", "-o", tmp_path / "small.safetensors") == 0
    small, found = exit_module(run, 1), evaluate_run(run)
    state = load_file(tmp_path / "small.safetensors")
    assert state.keys() == small.state_dict().keys() and any(name.startswith("exit.") for name in state)
    assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())
    whole = exit_module(run, 2)
    assert len(small) < len(whole) + 1 and "exit" not in dict(whole.named_children())
    from decoupled_pp.data import open_data
    from decoupled_pp.settings.load import load_settings

    held_out = list(open_data(load_settings(run / "config.yaml").data, 0).validation.batches())
    with torch.no_grad():
        right = sum((small(x).argmax(1) == y).sum().item() for x, y in held_out)
    assert right / sum(len(y) for _, y in held_out) == pytest.approx(found.exits[1].val_accuracy)
    assert sum(p.numel() for p in small.parameters()) == found.costs[1].parameters


def test_a_baselines_network_is_scored_and_exported_as_one_exit(run, tmp_path, capsys):
    """Its one exit is what the run itself has measured; the exported file is the run's own."""
    plain = f"--set=name=plain-{tmp_path.name}"
    assert run_dpp("train", run.parent / "tiny.yaml", plain, "--strategy=backprop", "--set=validation.knn=null") == 0
    folder = run.parent / f"plain-{tmp_path.name}"
    final = json.loads((folder / "summary.json").read_text())["final"]
    (one,) = evaluate_run(folder).exits
    assert (one.val_loss, one.val_accuracy) == (final["val_loss"], final["val_accuracy"])
    assert run_dpp("export", folder, "-o", tmp_path / "x.safetensors") == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert run_dpp("evaluate", run, "--plain", folder) == 0
    first, last = evaluate_run(run).exits[0].val_accuracy, evaluate_run(run).exits[-1].val_accuracy
    found = evaluate_run(run, plain=folder).depth
    assert found.benefit.median == pytest.approx(100 * (one.val_accuracy - first))
    assert found.kept is None or found.kept.median == pytest.approx((last - first) / (one.val_accuracy - first))
    assert found.text in capsys.readouterr().out
    with refused("another-task", UsageError, "`data`"):
        run_dpp("evaluate", run, "--plain", _with_other_data(folder, tmp_path))
    with refused("not-plain", UsageError, "3 stages"):
        run_dpp("evaluate", run, "--plain", run)


def _with_other_data(folder, tmp_path):
    import shutil

    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 64", "batch_size: 32"))
    return copy
