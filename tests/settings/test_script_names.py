"""The names that settings have in scripts: each is one field, `Trainer` takes it, and its faults say it."""

from collections import Counter

import pytest
import torch
import yaml
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.load import check_settings, load_settings
from decoupled_pp.settings.script_names import SCRIPT_NAMES, TRAINER_SECTIONS
from kit import check_text, refused

BATCHES = [(torch.randn(4, 3), torch.randint(2, (4,)))]
OF_FIT = {"steps", "validate_every", "validation_batches", "save_every"}
"""Options that `fit` takes; `steps` is not one of `Trainer`."""

OPTIONS = {key: name for key, name in SCRIPT_NAMES.items() if key.split(".")[0] in TRAINER_SECTIONS}
"""Key in the settings file -> option of `Trainer` or `fit`."""

GOOD = {
    "name": "run",
    "model": {"kind": "mlp"},
    "data": {"kind": "digits"},
    "training": {"steps": 5},
}
YES_OR_NO = {"checkpoint_activations", "compile", "refresh_tied"}


def trainer(**options):
    plan = partition([nn.Linear(3, 5), nn.Linear(5, 2)], 2, "uniform", BATCHES[0][0], device="cpu")
    return Trainer(plan, **{"device": "cpu", "observer": lambda records: None} | options)


def bad(name):
    """Return a value that the option cannot have."""
    return 7 if name in YES_OR_NO else -1


def test_names_are_unique():
    assert [name for name, count in Counter(SCRIPT_NAMES.values()).items() if count > 1] == []


@pytest.mark.parametrize("key", [key for key, name in OPTIONS.items() if name != "steps"])
def test_a_trainer_takes_each_option_and_its_faults_say_its_name(key):
    name = OPTIONS[key]
    section, _, field = key.partition(".")
    trainer(**{name: getattr(TRAINER_SECTIONS[section](), field)})
    with pytest.raises(UsageError) as caught:
        trainer(**{name: bad(name)})
    assert caught.value.key == key
    check_text(caught.value.code, str(caught.value), f"`{name}`", repr(bad(name)))
    assert key not in str(caught.value)


@pytest.mark.parametrize("name", sorted(OF_FIT))
def test_fit_names_its_options_too(name, tmp_path):
    (key,) = [key for key, given in OPTIONS.items() if given == name]
    with pytest.raises(UsageError) as caught:
        trainer(checkpoints=tmp_path).fit(BATCHES, **{"steps": 2, "validate": BATCHES, name: -1})
    check_text(caught.value.code, str(caught.value), f"`{name}`", "-1")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "code", "names", "keys"),
    [
        ({"refresh_tied": True}, "no-checkpoint-folder", ["`refresh_tied`"], ["checkpoint.refresh_tied"]),
        (
            {"critic_target": {"kind": "cascade", "lag": 3}, "capacity": 3},
            "lag-within-capacity",
            ["`capacity` 3"],
            ["links.capacity"],
        ),
        (
            {"critic_target": {"kind": "cascade"}, "stagger": 2},
            "rule-needs-every-packet",
            ["`stagger`"],
            ["training.stagger"],
        ),
    ],
)
def test_options_that_contradict_are_named_as_the_script_names_them(options, code, names, keys):
    with refused(code, UsageError, *names) as caught:
        trainer(**options)
    assert not any(key in str(caught.value) for key in keys)


def test_options_of_fit_that_would_do_nothing_are_named_as_the_script_names_them():
    with refused("validation-without-data", UsageError, "`validate_every`", "`validation_batches`"):
        trainer().fit(BATCHES, 2, validate_every=1)
    with refused("no-checkpoint-folder", UsageError, "`save_every`"):
        trainer().fit(BATCHES, 2, save_every=1)


@pytest.mark.parametrize("key", OPTIONS)
def test_a_settings_file_names_them_by_their_keys(key, tmp_path):
    section, _, field = key.partition(".")
    settings = GOOD | {section: GOOD.get(section, {}) | {field: bad(OPTIONS[key])}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UsageError) as caught:
        load_settings(file)
    assert caught.value.key == key
    check_text(caught.value.code, str(caught.value), f"{file}: `{key}`")


def test_a_section_and_a_shortcut_that_contradict_are_refused():
    with refused("given-twice", UsageError, "`clip_norm`") as caught:
        trainer(training={"clip_norm": 1.0}, clip_norm=2.0)
    assert caught.value.key == "training.clip_norm"


def test_an_unknown_option_is_a_type_error_with_a_suggestion():
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip_nrom'; did you mean 'clip_norm'"):
        trainer(clip_nrom=1.0)


def test_a_section_and_its_fields_mean_one_thing():
    in_section = trainer(training={"accumulate": 3}, links={"capacity": 2}).recipe
    as_options = trainer(accumulate=3, capacity=2).recipe
    of_file = check_settings(GOOD | {"training": {"steps": 5, "accumulate": 3}, "links": {"capacity": 2}})
    assert (in_section.training, in_section.links) == (as_options.training, as_options.links)
    assert (of_file.training.accumulate, of_file.links) == (as_options.training.accumulate, as_options.links)
