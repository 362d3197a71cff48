"""Settings: every bad key is one line that names the file, the key, the value and the remedy."""

import copy
import os

import pytest

from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.settings.load import check_settings, load_settings
from kit import refused

GOOD = {
    "name": "run",
    "stages": 2,
    "model": {"kind": "mlp"},
    "data": {"kind": "digits"},
    "training": {"steps": 5},
}

BAD = [
    ({"naem": "x"}, "unknown-setting", "naem", ["'x'", "did you mean 'name'?"]),
    ({"name": None}, "unusable-value", "name", ["a valid string", "None"]),
    ({"name": "a/b"}, "unusable-value", "name", ["should match pattern", "'a/b'"]),
    ({"name": "a" * 201}, "unusable-value", "name", ["should match pattern"]),
    ({"name": 20260131}, "unusable-value", "name", ["a valid string, not 20260131; quote it"]),
    ({"seed": 10**30}, "unusable-value", "seed", ["less than or equal to 1000000000000000000"]),
    ({"seed": 10**5000}, "unusable-value", "seed", ["a value of type int that cannot be shown"]),
    ({"threads": 10**6}, "unusable-value", "threads", ["not 1000000"]),
    ({"runs": ""}, "unusable-path", "runs", ["is empty"]),
    ({"runs": "a\0b"}, "unusable-path", "runs", ["NUL"]),
    ({"runs": "$DPP_NOT_SET/x"}, "unusable-path", "runs", ["$DPP_NOT_SET, which is not set"]),
    ({"start_from": "~no-such-user/x"}, "unusable-path", "start_from", ["write ./~"]),
    ({"model": {"kind": "mlp", "width": 10**8}}, "unusable-value", "model.width", ["not 100000000"]),
    ({"optimizer": {"lr": 1e300}}, "unusable-value", "optimizer.lr", ["not 1e+300"]),
    ({"optimizer": {"lr_per_stage": [1, 1e300]}}, "unusable-value", "optimizer.lr_per_stage", ["not 1e+300"]),
    ({"links": {"timeout_seconds": 1e300}}, "unusable-value", "links.timeout_seconds", ["not 1e+300"]),
    ({"links": {"capacity": 10**9}}, "unusable-value", "links.capacity", ["not 1000000000"]),
    ({"stages": 0}, "unusable-value", "stages", ["greater than or equal to 1", "not 0"]),
    ({"stages": 2.5}, "unusable-value", "stages", ["integer", "not 2.5"]),
    ({"stages": True}, "unusable-value", "stages", ["yes/no value", "True", "quote it"]),
    ({"seed": -1}, "unusable-value", "seed", ["greater than or equal to 0", "not -1"]),
    ({"device": "gpu"}, "not-one-of-the-choices", "device", ["'auto', 'cpu' or 'cuda'", "'gpu'"]),
    ({"model": {"kind": "gtp"}}, "unknown-kind", "model.kind", ["'gtp'", "did you mean 'gpt'?", "gpt, resnet, vgg"]),
    ({"model": {"width": 3}}, "unknown-kind", "model.kind", ["None", "a section with a `kind`"]),
    ({"model": {"kind": "mlp", "wdith": 3}}, "unknown-setting", "model.wdith", ["given 3", "did you mean 'width'?"]),
    (
        {"model": {"kind": "gpt", "width": 10, "heads": 4}},
        "contradictory-settings",
        "model",
        ["`model.width` 10", "`model.heads` 4"],
    ),
    ({"model": {"kind": "resnet", "depth": 9}}, "not-one-of-the-choices", "model.depth", ["8, 14, 20", "not 9"]),
    ({"data": {"kind": "digits", "batch_size": 0}}, "unusable-value", "data.batch_size", ["not 0"]),
    ({"data": {"kind": "digits", "context": 8}}, "unknown-setting", "data.context", ["given 8", "use one of "]),
    (
        {"data": {"kind": "huggingface", "path": "x"}},
        "contradictory-settings",
        "data",
        ["exactly one of `data.text_column` and `data.image_column`"],
    ),
    (
        {"data": {"kind": "huggingface", "path": "text", "text_column": "text"}},
        "contradictory-settings",
        "data",
        ["`data.path` 'text' is a builder", "{train: 'texts/*'}"],
    ),
    ({"critic": {"kind": "auglocal", "pyramid": 2}}, "unusable-value", "critic.pyramid", ["equal to 1", "not 2"]),
    ({"optimizer": {"lr": 0}}, "unusable-value", "optimizer.lr", ["greater than 0", "not 0"]),
    ({"optimizer": {"lr": float("inf")}}, "unusable-value", "optimizer.lr", ["finite", "not inf"]),
    (
        {"optimizer": {"kind": "SGD", "momentum": 0.9}},
        "unknown-setting",
        "optimizer.momentum",
        ["arguments, groups, kind, lr"],
    ),
    (
        {"optimizer": {"lr": 0.1, "arguments": {"lr": 5}}},
        "contradictory-settings",
        "optimizer",
        ["`optimizer.arguments.lr` 5", "`optimizer.lr` 0.1"],
    ),
    ({"schedule": {"kind": "cos"}}, "not-one-of-the-choices", "schedule.kind", ["'cosine'", "not 'cos'"]),
    ({"schedule": {"kind": "cosin"}}, "not-one-of-the-choices", "schedule.kind", ["did you mean 'cosine'?"]),
    ({"schedule": {"warmup": 5}}, "contradictory-settings", None, ["`schedule.warmup` 5", "`training.steps` 5"]),
    (
        {"training": {"steps": 5, "critic_warmup": 5}},
        "contradictory-settings",
        None,
        ["`training.critic_warmup` 5 leaves none"],
    ),
    ({"training": {"steps": 5, "stagger": 5}}, "contradictory-settings", None, ["`training.stagger` 5 leaves none"]),
    (
        {"schedule": {"kind": "steps", "milestones": [2, 5]}},
        "contradictory-settings",
        None,
        ["`schedule.milestones` [2, 5] go beyond `training.steps` 5"],
    ),
    (
        {"schedule": {"milestones": [1]}},
        "contradictory-settings",
        "schedule",
        ["`schedule.milestones` has no effect", "constant"],
    ),
    ({"schedule": {"kind": "steps"}}, "contradictory-settings", "schedule", ["needs `schedule.milestones`"]),
    ({"schedule": {"kind": "plateau"}}, "contradictory-settings", None, ["set `validation.every`"]),
    ({"schedule": {"patience": 2}}, "contradictory-settings", "schedule", ["`schedule.patience` has no effect"]),
    ({"validation": {"every": 6}}, "contradictory-settings", None, ["`validation.every` 6", "`training.steps` 5"]),
    ({"training": {}}, "missing-setting", "training.steps", []),
    ({"training": {"steps": 1, "clip_norm": -1}}, "unusable-value", "training.clip_norm", ["greater than 0", "not -1"]),
    ({"training": {"steps": 1, "precision": "fp16"}}, "not-one-of-the-choices", "training.precision", ["'fp16'"]),
    ({"links": {"capacity": 0}}, "unusable-value", "links.capacity", ["not 0"]),
    ({"links": {"timeout_seconds": 0}}, "unusable-value", "links.timeout_seconds", ["not 0"]),
    ({"cut": "params"}, "not-one-of-the-choices", "cut", ["'params'", "did you mean 'parameters'?", "e.g. [3, 2]"]),
    ({"cut": "tiem"}, "not-one-of-the-choices", "cut", ["'tiem'"]),
    ({"cut": [1, 2, 3]}, "contradictory-settings", None, ["`cut` [1, 2, 3]", "2 entries (`stages`)"]),
    ({"cut": [0, 2]}, "contradictory-settings", None, ["`cut` [0, 2]", "each at least 1"]),
    ({"checkpoint": {"keep": 0}}, "unusable-value", "checkpoint.keep", ["not 0"]),
    ({"checkpoint": {"refresh_tied": True}}, "refresh-needs-checkpoints", "checkpoint.every", []),
]
"""A change of good settings -> code and key of the fault, and parts of its text."""


def changed(change):
    return copy.deepcopy(GOOD) | change


def test_good_settings_are_read_with_their_defaults():
    settings = check_settings(GOOD)
    assert (settings.name, settings.training.steps, settings.links.capacity) == ("run", 5, 4)
    assert str(settings.folder) == "runs/run"


@pytest.mark.parametrize(("change", "code", "key", "parts"), BAD, ids=[shown(change) for change, *_ in BAD])
def test_a_bad_key_is_one_line(change, code, key, parts):
    named = [f"`{key}"] if key is not None else []
    with refused(code, UsageError, "run.yaml: ", *named, *parts) as caught:
        check_settings(changed(change), "run.yaml")
    assert caught.value.key == key


@pytest.mark.parametrize("key", ["name", "model", "data", "training"])
def test_a_missing_key_is_named(key):
    with refused("missing-setting", UsageError, f"`{key}`"):
        check_settings({k: value for k, value in GOOD.items() if k != key})


def test_more_faults_are_counted():
    with refused("unusable-value", UsageError, "(and 1 more)"):
        check_settings(changed({"seed": -1, "stages": 0}))


YAML = """
name: run
stages: 2
model: {kind: mlp, width: 8}
data: {kind: digits}
training: {steps: 5}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_what_a_terminal_would_obey_is_written_out():
    with refused("unknown-setting", UsageError, r"`a \x1b[31m`: unknown key"):
        check_settings(changed({"a\n\x1b[31m": 1}))


def test_a_date_is_a_name(file):
    """YAML 1.1 would make a date of it, which no setting takes, or fail."""
    assert load_settings(file, ("name=2026-01-31",)).name == "2026-01-31"
    assert load_settings(file, ("name=2020-13-45",)).name == "2020-13-45"


def test_paths_are_read_as_a_shell_reads_them(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DPP_SCRATCH", "/scratch/me")
    settings = load_settings(file, ("runs=~/runs", "start_from=${DPP_SCRATCH}/a/../b"))
    assert (settings.runs, settings.start_from) == ("/home/me/runs", "/scratch/me/a/../b")
    data = {"kind": "text", "files": ["~/*.txt", "$DPP_SCRATCH/**/*.txt", "./here"], "tokenizer": "gpt2"}
    checked = check_settings(changed({"data": data})).data
    assert checked.files == ["/home/me/*.txt", "/scratch/me/**/*.txt", "./here"] and checked.tokenizer == "gpt2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings("~/run.yaml").name == "run"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_another_editor_is_read(file, encoding):
    file.write_bytes(YAML.encode(encoding))
    assert load_settings(file).training.steps == 5


def test_a_pipe_is_read_and_one_that_nobody_fills_is_not_waited_for(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, YAML.encode())
    os.close(writing)
    try:
        assert load_settings(f"/dev/fd/{reading}").name == "run"
    finally:
        os.close(reading)
    os.mkfifo(tmp_path / "pipe")
    with refused("configuration-is-no-mapping", UsageError, "pipe"):
        load_settings(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("path", "code"), [("/dev/zero", "configuration-is-no-yaml"), (".", "configuration-unreadable")]
)
def test_what_is_no_file(path, code):
    with refused(code, UsageError, path):
        load_settings(path)


def test_overrides_are_yaml(file):
    settings = load_settings(file, ("training.steps=7", "cut=[3, 2]", "training.clip_norm=0.5", "links.capacity=1"))
    assert (settings.training.steps, settings.cut) == (7, [3, 2])
    assert (settings.training.clip_norm, settings.links.capacity) == (0.5, 1)


@pytest.mark.parametrize(
    ("override", "code", "parts"),
    [
        ("training.steps", "override-unreadable", ["'training.steps'"]),
        ("=3", "override-unreadable", ["'=3'"]),
        ("stages.x=3", "override-unreadable", ["'stages' holds a value"]),
        ("training.step=3", "unknown-setting", ["--set training.step=3: `training.step`", "did you mean 'steps'?"]),
        ("training.steps=many", "unusable-value", ["--set training.steps=many: `training.steps`"]),
        ("schedule.warmup=9", "contradictory-settings", ["--set schedule.warmup=9: `schedule.warmup` 9"]),
        ("model={kind: gpt, width: 3}", "contradictory-settings", ["--set model={kind: gpt, width: 3}: `model`"]),
        ("model.kind=gtp", "unknown-kind", ["--set model.kind=gtp: `model.kind`"]),
    ],
)
def test_a_bad_override_is_one_line(file, override, code, parts):
    with refused(code, UsageError, *parts):
        load_settings(file, (override,))


BOMB = b"a0: &a0 [0]\n" + b"\n".join(
    b"a%d: &a%d [%s]" % (k, k, b", ".join([b"*a%d" % (k - 1)] * 9)) for k in range(1, 30)
)
"""Nine aliases of nine aliases of ..."""


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b"a: [1", "configuration-is-no-yaml", "is not YAML"),
        (b"- 1\n- 2\n", "configuration-is-no-mapping", "must hold a mapping of settings, not list"),
        (b"\xff\xfa\x00x", "configuration-is-no-yaml", "is not YAML"),
        (b"name: !!timestamp x", "configuration-is-no-yaml", "is not YAML: 'x' on line 1 has the tag"),
        (b"a: !!python/name:os.system x", "configuration-is-no-yaml", "is not YAML: 'x' on line 1 has the tag"),
        (b"a: !!float x", "configuration-is-no-yaml", "is not YAML: 'x' on line 1 is no float"),
        (b"\na: " + b"9" * 5000, "configuration-is-no-yaml", "is not YAML: '999"),
        (b"a: 0x" + b"f" * 5000, "configuration-is-no-yaml", "is not YAML: '0xfff"),
        (b"a: " + b"[" * 5000, "configuration-is-no-yaml", "is not YAML: it is nested more than 50 levels deep"),
        (b"- " * 5000, "configuration-is-no-yaml", "is not YAML: it is nested more than 50 levels deep"),
        (b"a: &a [*a]", "configuration-is-no-yaml", "levels deep, perhaps by an alias of itself"),
        (BOMB, "configuration-is-no-yaml", "takes the text over 20000 values"),
        (b'a: "\\0"', "configuration-is-no-yaml", "holds a character that is none"),
        (b'a: "\\ud800"', "configuration-is-no-yaml", "holds a character that is none"),
        (b"a: 1\x00", "configuration-is-no-yaml", "is not YAML"),
        (b"a:\t- 1\n\tb: 2", "configuration-is-no-yaml", "is not YAML"),
        (b"# x\n" * 100_000, "configuration-is-no-yaml", "is longer than 262144 characters"),
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", "configuration-is-no-yaml", "is not YAML: key 'c' is given on line 3"),
    ],
)
def test_what_is_no_settings_file(tmp_path, content, code, text):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with refused(code, UsageError, str(path), text):
        load_settings(path)


def test_only_the_override_at_fault_is_named(file):
    with refused("unusable-value", UsageError) as caught:
        load_settings(file, ("seed=1", "model.width=0", "stages=3"))
    assert str(caught.value).startswith("--set model.width=0: `model.width`")
    file.write_text(file.read_text().replace("steps: 5", "steps: 0"))
    with refused("unusable-value", UsageError) as caught:
        load_settings(file, ("seed=1",))
    assert str(caught.value).startswith(f"{file}: `training.steps`")


def test_a_file_that_is_not_there(tmp_path):
    with refused("configuration-unreadable", UsageError, "nowhere.yaml", "No such file or directory"):
        load_settings(tmp_path / "nowhere.yaml")


def test_settings_do_not_change_after_the_check():
    settings = check_settings(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        settings.stages = 3


@pytest.mark.parametrize(
    ("given", "code", "part"),
    [
        ({"critic": "head"}, "section-expected", "write critic: {kind: head}"),
        ({"schedule": ["cosine", "linear"]}, "section-expected", "`schedule` is one section"),
        ({"optimizer": {"weight_decay": 0.1}}, "unknown-setting", "go under `optimizer.arguments`"),
    ],
)
def test_natural_mistakes_get_their_cure(given, code, part):
    raw = {"name": "x", "model": {"kind": "mlp"}, "data": {"kind": "digits"}, "training": {"steps": 9}}
    with refused(code, UsageError, part):
        check_settings({**raw, **given})
