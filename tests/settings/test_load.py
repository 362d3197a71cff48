"""Settings: every bad key is one line that names the file, the key, the value and the remedy."""

import copy

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.load import check_settings, load_settings

GOOD = {
    "name": "run",
    "stages": 2,
    "model": {"kind": "mlp"},
    "data": {"kind": "digits"},
    "training": {"steps": 5},
}

MODELS = "one of gpt, resnet, vgg, mlp, huggingface, factory"
AT_LEAST_1 = "Input should be greater than or equal to 1, not 0"
ABOVE_0 = "Input should be greater than 0, not"

BAD = [
    ({"naem": "x"}, "naem: unknown key, given 'x'; did you mean 'name'?"),
    ({"name": None}, "name: Input should be a valid string, not None"),
    ({"name": "a/b"}, "name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', not 'a/b'"),
    ({"stages": 0}, f"stages: {AT_LEAST_1}"),
    ({"stages": 2.5}, "stages: Input should be a valid integer, got a number with a fractional part, not 2.5"),
    ({"seed": -1}, "seed: Input should be greater than or equal to 0, not -1"),
    ({"device": "gpu"}, "device: Input should be 'auto', 'cpu' or 'cuda', not 'gpu'"),
    ({"model": {"kind": "gtp"}}, f"model.kind: 'gtp' is not known; did you mean 'gpt'?; {MODELS}"),
    ({"model": {"width": 3}}, "model.kind: None is not known; a section with a `kind` is needed"),
    ({"model": {"kind": "mlp", "wdith": 3}}, "model.wdith: unknown key, given 3; did you mean 'width'?"),
    ({"model": {"kind": "gpt", "width": 10, "heads": 4}}, "model: width 10 is not a multiple of heads 4"),
    ({"model": {"kind": "resnet", "depth": 9}}, "model.depth: Input should be 8, 14, 20, 26, 32, 44, 56 or 110, not 9"),
    ({"data": {"kind": "digits", "batch_size": 0}}, f"data.batch_size: {AT_LEAST_1}"),
    ({"data": {"kind": "digits", "context": 8}}, "data.context: unknown key, given 8; use one of "),
    ({"data": {"kind": "huggingface", "path": "x"}}, "data: give exactly one of text_column and image_column"),
    ({"critic": {"kind": "auglocal", "pyramid": 2}}, "critic.pyramid: Input should be less than or equal to 1, not 2"),
    ({"optimizer": {"lr": 0}}, f"optimizer.lr: {ABOVE_0} 0"),
    (
        {"optimizer": {"kind": "SGD", "momentum": 0.9}},
        "optimizer.momentum: unknown key, given 0.9; use one of arguments, kind, lr",
    ),
    (
        {"schedule": {"kind": "cos"}},
        "schedule.kind: Input should be 'constant', 'cosine', 'linear' or 'steps', not 'cos'",
    ),
    (
        {"schedule": {"kind": "cosin"}},
        "schedule.kind: Input should be 'constant', 'cosine', 'linear' or 'steps', not 'cosin'; did you mean 'cosine'?",
    ),
    ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: Input should be a finite number, not inf"),
    (
        {"optimizer": {"lr": 0.1, "arguments": {"lr": 5}}},
        "optimizer: arguments.lr 5 would override lr 0.1; give lr alone",
    ),
    ({"validation": {"every": 6}}, "run.yaml: validation.every 6 is more than training.steps 5; lower it, or leave it"),
    ({"stages": True}, "run.yaml: stages takes no yes/no value, not true; quote it if it is meant as text"),
    (
        {"data": {"kind": "huggingface", "path": "text", "text_column": "text"}},
        "data: path 'text' is a builder and needs data_files, e.g. {train: 'texts/*'}; or give a folder",
    ),
    ({"schedule": {"warmup": 5}}, "run.yaml: schedule.warmup 5 leaves none of training.steps 5; lower the one or"),
    (
        {"schedule": {"milestones": [1]}},
        "schedule.milestones has no effect with schedule.kind 'constant'; leave it out, or use kind",
    ),
    ({"schedule": {"kind": "steps"}}, "run.yaml: schedule.kind 'steps' needs schedule.milestones; give a list"),
    ({"training": {}}, "training.steps: required key is missing"),
    ({"training": {"steps": 1, "clip_norm": -1}}, f"training.clip_norm: {ABOVE_0} -1"),
    (
        {"training": {"steps": 1, "precision": "fp16"}},
        "training.precision: Input should be 'fp32' or 'bf16', not 'fp16'",
    ),
    ({"links": {"capacity": 0}}, f"links.capacity: {AT_LEAST_1}"),
    ({"links": {"timeout_seconds": 0}}, f"links.timeout_seconds: {ABOVE_0} 0"),
    (
        {"cut": "params"},
        "cut: Input should be 'time', 'parameters' or 'uniform', not 'params'; did you mean 'parameters'?; "
        "or give the layers per stage, e.g. [3, 2]",
    ),
    ({"cut": [1, 2, 3]}, "cut [1, 2, 3] must have 2 entries (stages), each at least 1"),
    ({"cut": [0, 2]}, "cut [0, 2] must have 2 entries (stages), each at least 1"),
    ({"cut": "tiem"}, "cut: Input should be 'time', 'parameters' or 'uniform', not 'tiem'"),
    ({"checkpoint": {"keep": 0}}, f"checkpoint.keep: {AT_LEAST_1}"),
]


def changed(change):
    return copy.deepcopy(GOOD) | change


def test_good_settings_are_read_with_their_defaults():
    settings = check_settings(GOOD)
    assert (settings.name, settings.training.steps, settings.links.capacity) == ("run", 5, 4)
    assert str(settings.folder) == "runs/run"


@pytest.mark.parametrize(("change", "text"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_key_is_one_line(change, text):
    with pytest.raises(UsageError) as caught:
        check_settings(changed(change), "run.yaml")
    line = str(caught.value)
    assert line.startswith("run.yaml: ")
    assert text in line
    assert "\n" not in line


@pytest.mark.parametrize("key", ["name", "model", "data", "training"])
def test_a_missing_key_is_named(key):
    with pytest.raises(UsageError, match=f"settings: {key}: required key is missing"):
        check_settings({k: value for k, value in GOOD.items() if k != key})


def test_more_faults_are_counted():
    with pytest.raises(UsageError, match=r"\(and 1 more\)"):
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


def test_overrides_are_yaml(file):
    settings = load_settings(file, ("training.steps=7", "cut=[3, 2]", "training.clip_norm=0.5", "links.capacity=1"))
    assert (settings.training.steps, settings.cut) == (7, [3, 2])
    assert (settings.training.clip_norm, settings.links.capacity) == (0.5, 1)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.steps", "override 'training.steps' must look like key.sub=value"),
        ("training.step=3", "training.step: unknown key, given 3; did you mean 'steps'?"),
        ("=3", "override '=3' must look like key.sub=value"),
        ("training.steps=many", "--set training.steps=many: training.steps: Input should be a valid integer"),
        ("schedule.warmup=9", "--set schedule.warmup=9: schedule.warmup 9 leaves none of training.steps 5"),
        ("model={kind: gpt, width: 3}", "--set model={kind: gpt, width: 3}: model: width 3 is not a multiple"),
        ("stages.x=3", "override 'stages.x=3': 'stages' is not a section"),
    ],
)
def test_a_bad_override_is_one_line(file, override, text):
    with pytest.raises(UsageError) as caught:
        load_settings(file, (override,))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a: [1", "is not YAML"),
        (b"- 1\n- 2\n", "must hold a mapping of settings, not list"),
        (b"\xff\xfe\x00x", "is not YAML"),
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", "is not YAML: key 'c' is given on line 3 and again on line 4; keep one"),
    ],
)
def test_what_is_no_settings_file(tmp_path, content, text):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_settings(path)
    assert f"{path} {text}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_override_at_fault_is_named(file):
    with pytest.raises(UsageError, match=r"^--set model.width=0: model.width: "):
        load_settings(file, ("seed=1", "model.width=0", "stages=3"))
    with pytest.raises(UsageError, match=rf"^{file}: training.steps: "):
        file.write_text(file.read_text().replace("steps: 5", "steps: 0"))
        load_settings(file, ("seed=1",))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        UsageError, match=r"cannot read the configuration .*nowhere.yaml: No such file or directory; give"
    ):
        load_settings(tmp_path / "nowhere.yaml")


def test_settings_do_not_change_after_the_check():
    settings = check_settings(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        settings.stages = 3
