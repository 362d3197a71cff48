"""Some sixty odd values for every argument of the public calls: each is taken, or refused in one line."""

import sys

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from kit import ignore, tanh_network

X, Y = torch.randn(4, 6), torch.arange(4) % 3


class Odd:
    """Nothing in particular."""


def _odd():
    """Return the values anew: iterators among them are used up."""
    numbers = [None, True, False, 0, -1, 3, 10**30, 1.5, float("nan"), float("inf"), -float("inf"), 3 + 2j]
    texts = ["", "x", "AdamW", "None", "é\0", b"x", memoryview(b"a"), "a" * 200]
    lists = [[], [1], [None], ["a"], [[]], (), (1, 2), {}, {"a": 1}, {"kind": 3}, {"kind": None}, {None: 1}, {1: 2}]
    several = [set(), {1}, range(3), iter([]), (i for i in []), slice(1, 2)]
    torches = [torch.zeros(0), torch.zeros(1), torch.tensor(3), torch.float32, torch.device("cpu")]
    modules = [nn.Linear, nn.Linear(2, 2), nn.Module(), nn.ReLU, torch.optim.SGD([torch.zeros(1, requires_grad=True)])]
    functions = [lambda: 0, lambda a: a, lambda a, b: a, lambda *a, **k: None, print]
    objects = [object(), Odd, Odd(), Ellipsis, NotImplemented, Exception("x"), sys]
    return [*numbers, *texts, *lists, *several, *torches, *modules, *functions, *objects]


def _trainer(**given):
    plan = dpp.partition(tanh_network(3, 6, 3), 2, "uniform", X)
    return dpp.Trainer(plan, **({"critic": "head", "device": "cpu", "observer": ignore} | given))


def _partition(**given):
    return dpp.partition(**({"layers": tanh_network(3, 6, 3), "stages": 2, "by": "uniform", "sample": X} | given))


def _fit(**given):
    return _trainer().fit(**({"train_batches": [(X, Y)], "steps": 1, "trace_packets": range(0)} | given))


def _argument(call, name):
    return lambda value: call(**{name: value})


# `sample` goes wherever the layers take it.
PARTITION = "layers stages by critic critic_target loss device speeds memory optimizer accumulate timeout_seconds"
TRAINER = (
    "critic critic_target global_correction optimizer schedule device seed observer accumulate clip_norm precision "
    "checkpoint_activations stagger critic_warmup capacity timeout_seconds knn knn_samples keep_checkpoints log_every "
    "training links validation checkpoint logging"
)
FIT = "train_batches steps validate validate_every validation_batches save_every resume trace_packets"

CALLS = {
    **{f"partition {name}": _argument(_partition, name) for name in PARTITION.split()},
    **{f"Trainer {name}": _argument(_trainer, name) for name in TRAINER.split()},
    **{f"fit {name}": _argument(_fit, name) for name in FIT.split()},
    "Trainer plan": lambda value: dpp.Trainer(value, device="cpu", observer=ignore),
    "build resume": lambda value: _trainer().build(value),
    "evaluate batches": lambda value: _trainer().evaluate(value),
    "evaluate resume": lambda value: _trainer().evaluate([(X, Y)], resume=value),
    "flatten": dpp.flatten,
    "untie": dpp.untie,
    "cut_after network": lambda value: dpp.cut_after(value, ["0"]),
    "cut_after names": lambda value: dpp.cut_after(tanh_network(3, 6, 3), value),
    "write_shards checkpoints": lambda value: dpp.write_shards(value, "nowhere", {}),
    "write_shards output": lambda value: dpp.write_shards("nowhere", value, {}),
    "write_shards names": lambda value: dpp.write_shards("nowhere", "nowhere", value),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_value_is_taken_or_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in _odd():
        try:
            CALLS[name](value)
        except (dpp.UsageError, dpp.TrainingError) as error:
            assert "\n" not in str(error)
        except Exception as error:
            pytest.fail(f"{value!r}: {type(error).__name__}: {error}")
    assert not list(tmp_path.iterdir())
