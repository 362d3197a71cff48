"""Law 7: save, stop, resume == never stopped; data order, RNG, schedule and optimizer included.

And a checkpoint loads into any other cut: weights and optimizer state by name, critics where their place is still cut.
"""

import pytest
import torch
from cases import ADAMW, CASES, MOMENTUM, MUON, train
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.optimizer_state import group_entries
from decoupled_pp.run.checkpoints.opened import latest_checkpoint
from decoupled_pp.settings.run import ScheduleSettings
from kit import differences, merged, refused, states
from ranks import launch, values

STEPS, STOP_AFTER = 9, 4
OPTIONS = {
    "accumulate": 2,
    "clip_norm": 0.5,
    "schedule": ScheduleSettings(kind="cosine", warmup=3, final=0.1),
}


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM, MUON], ids=lambda chosen: chosen["kind"])
@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_resumed_equals_never_stopped(case, optimizer, tmp_path):
    never_stopped = train(case, 2, STEPS, batches=13, optimizer=optimizer, **OPTIONS)

    stopped = _stop_early(case, 2, tmp_path, optimizer=optimizer)
    resumed = _resume(case, 2, tmp_path, optimizer=optimizer)

    assert differences(resumed, never_stopped) == []
    assert differences(stopped, never_stopped) != []


class Adapting(torch.optim.SGD):
    """Counts its steps and sets its rate in `param_groups`, as schedule-free optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05)
        for group in self.param_groups:
            group.update(k=0, span=(1.0, 2.0), moved=torch.zeros(()))

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["span"] = (1.0, 2.0 + group["k"])
            group["moved"] += group["lr"]
            group["lr"] = float(0.05 / (group["k"] + group["moved"]) * group["span"][1])
        super().step(closure)


class Noisy(torch.optim.SGD):
    """Draws a random number in every step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05)

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


@pytest.mark.parametrize("optimizer", [Adapting, Noisy])
def test_optimizers_that_keep_state_of_their_own(optimizer, tmp_path):
    case = CASES["mlp with dropout"]
    never_stopped, stopped = (case.trainer(2, optimizer=optimizer, checkpoints=folder) for folder in (None, tmp_path))
    never_stopped.fit(case.batches(13), STEPS)
    stopped.fit(case.batches(13), STOP_AFTER)
    resumed = case.trainer(2, optimizer=optimizer)
    resumed.fit(case.batches(13), STEPS, resume=latest_checkpoint(tmp_path))
    assert differences(states(resumed), states(never_stopped)) == []
    for ours, theirs in zip(resumed.stages, never_stopped.stages, strict=True):
        assert group_entries(ours.update.optimizers) == group_entries(theirs.update.optimizers)


def _sharing(folder=None):
    """Two layers of one stage use one matrix."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    layers[1].weight = layers[0].weight
    plan = partition(layers, 2, [2, 2], torch.randn(2, 4))
    return Trainer(plan, critic="head", loss="mse", optimizer="AdamW", checkpoints=folder)


def test_a_parameter_used_twice_in_a_stage(tmp_path):
    batches = [(torch.randn(2, 4), torch.randn(2, 4)) for _ in range(5)]
    never_stopped, stopped, resumed = _sharing(), _sharing(tmp_path), _sharing(tmp_path)
    never_stopped.fit(batches, 5)
    stopped.fit(batches, 2)
    resumed.fit(batches, 5, resume=True)
    assert differences(states(resumed), states(never_stopped)) == []
    first, second, *_ = resumed.plan.module
    assert first.weight is second.weight


def test_state_of_a_whole_stage_fits_no_other_cut(tmp_path):
    case = CASES["mlp"]
    case.trainer([2, 2], optimizer=Adapting, checkpoints=tmp_path).fit(case.batches(5), 3)
    with refused("optimizer-state-of-another-cut", UsageError, "in param_groups", "[0, 2, 4]"):
        case.trainer([1, 3], optimizer=Adapting).fit(case.batches(5), 5, resume=latest_checkpoint(tmp_path))


def test_settings_that_the_optimizer_leaves_alone_may_change(tmp_path):
    case = CASES["mlp"]
    case.trainer(2, checkpoints=tmp_path).fit(case.batches(5), 3)
    resumed = case.trainer(2, optimizer=ADAMW | {"lr": 1e-3})
    resumed.fit(case.batches(5), 5, resume=latest_checkpoint(tmp_path))
    assert [stage.learning_rate for stage in resumed.stages] == [1e-3, 1e-3]


AMSGRAD = ADAMW | {"arguments": {"amsgrad": True}}


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (MUON, ADAMW, "Muon"),
        (ADAMW, MUON, "AdamW"),
        (ADAMW, MOMENTUM, "AdamW"),
        (ADAMW, AMSGRAD, "max_exp_avg_sq"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_before_anything_is_trained(before, after, named, tmp_path):
    case = CASES["gpt"]
    case.trainer(2, optimizer=before, checkpoints=tmp_path).fit(case.batches(5), 3)
    with refused("checkpoint-of-another-optimizer", UsageError, named):
        case.trainer(2, optimizer=after).build(latest_checkpoint(tmp_path))


def test_state_that_an_optimizer_no_longer_needs_is_no_hindrance(tmp_path):
    case = CASES["gpt"]
    case.trainer(2, optimizer=AMSGRAD, checkpoints=tmp_path).fit(case.batches(5), 3)
    assert case.trainer(2).fit(case.batches(5), 5, resume=latest_checkpoint(tmp_path)).steps == 5


def test_over_ranks(tmp_path):
    case, folder = "gpt with dropout", tmp_path / "checkpoints"
    never_stopped = train(case, 2, STEPS, batches=13, **OPTIONS)

    launch(_stop_early, case, 2, folder, size=2, folder=tmp_path / "first")
    resumed = merged(values(launch(_resume, case, 2, folder, size=2, folder=tmp_path / "second")))

    assert differences(resumed, never_stopped) == []


def test_a_second_fit_goes_on_as_one_longer_fit_would():
    """Without a schedule, whose length is that of the run, two calls are one."""
    case = CASES["mlp"]
    batches = case.batches(13)
    once, twice = case.trainer(2), case.trainer(2)
    once.fit(batches, 9)
    twice.fit(batches, 4)
    twice.fit(batches, 5)
    assert differences(states(once), states(twice)) == []


FOUR = [1, 1, 1, 1]  # embedding | block0 | block1 | head


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([4], []),
        ([2, 2], ["after_block0"]),
        ([1, 2, 1], ["after_embedding", "after_block1"]),
        ([1, 1, 1, 1], ["after_embedding", "after_block0", "after_block1"]),
    ],
)
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda chosen: chosen["kind"])
def test_a_checkpoint_of_four_stages_loads_into_any_cut(sizes, kept, optimizer, tmp_path):
    saved = _flat(_save(FOUR, tmp_path, optimizer), FOUR)
    loaded, notes = _load(sizes, tmp_path, optimizer)

    assert _wrong(loaded, saved) == []
    assert {name.split(".")[1] for name in loaded if name.startswith("critic.")} == set(kept)
    assert {name for name in saved if name.startswith("optimizer.model.")} <= set(loaded)
    assert _announced(notes, "no critic") == []
    assert len(_announced(notes, "random stream")) == (0 if sizes == FOUR else len(sizes))


def test_a_critic_that_moved_starts_anew_and_is_announced(tmp_path):
    saved = _flat(_save([2, 2], tmp_path, ADAMW), [2, 2])
    loaded, notes = _load([1, 2, 1], tmp_path, ADAMW)

    assert _wrong(loaded, saved) == [
        name for name in sorted(loaded) if name.startswith(("critic.", "optimizer.critic."))
    ]
    assert _announced(notes, "no critic") == ["after_embedding", "after_block1"]


def test_training_goes_on_under_another_cut(tmp_path):
    case = CASES["gpt"]
    _save(FOUR, tmp_path, ADAMW)
    trainer = case.trainer([2, 2])
    report = trainer.fit(case.batches(5), 7, resume=latest_checkpoint(tmp_path))
    assert report.steps == 7


@pytest.mark.parametrize("sizes", [[1, 3], [3, 1]])
def test_a_script_that_measures_again_keeps_the_cut(sizes, tmp_path):
    """A new measurement may give another cut, and at least one of these two is another."""
    case, records = CASES["gpt"], []
    case.trainer(sizes, checkpoints=tmp_path).fit(case.batches(5), 2)
    plan = partition(case.network(), 2, "time", case.batches(1)[0][0], device="cpu")
    trainer = Trainer(plan, device="cpu", checkpoints=tmp_path, observer=records.extend, **case.options)
    trainer.fit(case.batches(5), 4, resume=True)
    assert list(trainer.plan.sizes) == sizes
    assert [record for record in records if record["kind"] == "note"] == []


def _stop_early(case, stages, folder, **options):
    """Like a Ctrl-C while the batch after step STOP_AFTER is read; the checkpoint is saved on the way out."""
    trainer = CASES[case].trainer(stages, checkpoints=folder, **OPTIONS, **options)
    batches = CASES[case].batches(13)

    def interrupted_batches():
        for number, batch in enumerate(batches):
            if number == STOP_AFTER * OPTIONS["accumulate"] - 1:
                trainer.interrupted.set()
            yield batch

    report = trainer.fit(interrupted_batches, STEPS)
    assert (report.steps, report.stopped) == (STOP_AFTER, "interrupted")
    return states(trainer)


def _resume(case, stages, folder, **options):
    trainer = CASES[case].trainer(stages, **OPTIONS, **options)
    trainer.fit(CASES[case].batches(13), STEPS, resume=latest_checkpoint(folder))
    return states(trainer)


def _save(sizes, folder, optimizer):
    case = CASES["gpt"]
    trainer = case.trainer(sizes, checkpoints=folder, optimizer=optimizer)
    trainer.fit(case.batches(5), 5)
    return states(trainer)


def _load(sizes, folder, optimizer):
    """The state right after loading, and what was said about it."""
    case, records = CASES["gpt"], []
    trainer = case.trainer(sizes, optimizer=optimizer, seed=99, observer=records.extend)
    trainer.evaluate(case.batches(1), resume=latest_checkpoint(folder))
    return _flat(states(trainer), sizes), [record["text"] for record in records if record["kind"] == "note"]


def _flat(states, sizes):
    """Weights, critics and optimizer state of all stages under the names they have in a checkpoint."""
    layers = list(CASES["gpt"].network()._modules)
    flat = {}
    for stage, tensors in states.items():
        place = f"after_{layers[sum(sizes[: stage + 1]) - 1]}"
        for name, tensor in tensors.items():
            if name.startswith(("model.", "optimizer.model.")):
                flat[name] = tensor
            elif name.startswith("critic."):
                flat[name.replace("critic.", f"critic.{place}.", 1)] = tensor
            elif name.startswith("optimizer.critic."):
                flat[name.replace("optimizer.critic.here", f"optimizer.critic.{place}")] = tensor
    return flat


def _wrong(loaded, saved):
    return [name for name in sorted(loaded) if differences(loaded[name], saved.get(name))]


def _announced(notes, what):
    """The critics (or stages) that notes about `what` name."""
    texts = [note for note in notes if what in note]
    return [next((word for word in text.split() if word.startswith("after_")), text) for text in texts]
