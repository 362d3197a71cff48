"""Whatever stands in a settings file, an override or an option of a script: settings, or one line and nothing written.

The inputs are derived from the declarations in `settings/`, so a new setting is tried as well.
"""

import contextlib
import io
import math
import sys
from datetime import date
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from torch import nn

import kit
from decoupled_pp import Trainer, UsageError, partition
from decoupled_pp.commands import train
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.script_names import SCRIPT_NAMES, TRAINER_SECTIONS
from decoupled_pp.settings.sections import Section, section_types

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
seeded = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=20_000,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
)

EXTREME = [0, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**5000, -0.0, 1e-320, 1e300, math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "~", "~/x", "~nobody/x", "$NOPE/x", "${HOME}/x", "a\0b", "\ud800", "\x1b[31m", "a\nb", "x" * 5000]
TEXTS += ["mlp", "yes", "1e5", "2020-13-45", "=", "<<", "/dev/zero", "/", "../..", "a:b", "os:system", "1_000"]
hostile = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(EXTREME),
        st.sampled_from(TEXTS),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.just(date(2020, 1, 31)),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


CONTAINERS = {
    Literal: st.sampled_from,
    list: lambda parts: st.lists(plausible(parts[0]), max_size=3),
    dict: lambda parts: st.dictionaries(st.sampled_from(["width", "betas", "eps"]), hostile, max_size=2),
}


def plausible(annotation, metadata=()):
    """Values that a field of this type may have, mostly."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return plausible(parts[0], [bound for part in parts[1:] for bound in getattr(part, "metadata", [])])
    if kind in CONTAINERS:
        return CONTAINERS[kind](parts)
    if parts:
        return st.one_of([plausible(part) for part in parts])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return section(annotation)
    return scalar(annotation, metadata)


def scalar(annotation, metadata):
    bounds = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if annotation is int:
        return st.integers(low, min(high or 9, (low or 0) + 9))
    if annotation is float:
        return st.floats(low, high, allow_nan=False)
    if annotation is str:
        return st.sampled_from(["run", "torch:relu", "cross_entropy", "AdamW", "text"])
    return {bool: st.booleans(), type(None): st.none()}[annotation]


def section(kind):
    fields = {name: plausible(field.annotation, field.metadata) for name, field in kind.model_fields.items()}
    required = {name for name, field in kind.model_fields.items() if field.is_required() or name == "kind"}
    return st.fixed_dictionaries(
        {name: fields[name] for name in required}, optional={name: fields[name] for name in fields.keys() - required}
    )


KEYS = sorted(
    {
        f"{key}.{name}" if name else key
        for key, field in Settings.model_fields.items()
        for name in ["", "x", *(name for kind in section_types(field.annotation) for name in kind.model_fields)]
    }
)
SNIPPETS = [
    "\t",
    "a: &a [*a]",
    "- x",
    "? [a]\n: b",
    "!!python/object/apply:os.system [ls]",
    "name: !!timestamp x",
    "%YAML 9",
]
SNIPPETS += [
    "seed: !!int x",
    "name: !!binary x",
    "seed: 0x" + "f" * 5000,
    "seed: " + "9" * 5000,
    "x: " + "[" * 3000,
    "<<: *z",
]
SNIPPETS += [
    "a: &a {<<: *a}",
    "...",
    "---",
    "name: twice",
    '"a\\0b": 1',
    "\ufeff",
    "\x00",
    "seed: 0b_",
    "cut: [1, 1]]",
    "<<: 3",
]
SNIPPETS += ["a0: &a0 [0]\n" + "\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))]
SNIPPETS += ["\n".join(f"m{k}: &m{k} {{<<: [{', '.join([f'*m{k - 1}'] * 9)}]}}" for k in range(1, 12))]


def changed(raw, changes):
    """Good settings with values put at some keys."""
    for key, value in changes:
        first, _, last = key.partition(".")
        if not last:
            raw[first] = value
        elif isinstance(raw.get(first), dict):
            raw[first][last] = value
    return raw


raws = st.builds(
    changed, section(Settings), st.lists(st.tuples(st.sampled_from(KEYS), hostile), max_size=2) | st.just([])
)


def spliced(raw, splices):
    lines = yaml.safe_dump(raw, allow_unicode=True).encode("utf-8", "surrogatepass").splitlines()
    for place, content in splices:
        lines.insert(place % (len(lines) + 1), content)
    return b"\n".join(lines)


files = st.builds(
    spliced,
    raws,
    st.lists(
        st.tuples(
            st.integers(0, 99), st.sampled_from(SNIPPETS).map(lambda text: text.encode("utf-8")) | st.binary(max_size=9)
        ),
        max_size=1,
    ),
)
words = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(SNIPPETS) | st.text(max_size=20)),
    st.builds(lambda key, value: f"{key}={yaml.safe_dump(value)}", st.sampled_from(KEYS), hostile),
    st.text(max_size=20),
    st.just(".".join("a" * 3000) + "=1"),
)


@contextlib.contextmanager
def limited_digits():
    """The package meets numbers of 5000 digits under Python's limit."""
    sys.set_int_max_str_digits(4300)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(0)


@pytest.fixture(autouse=True)
def _unlimited_digits():
    """To write them, and to report them, there is none."""
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(4300)


@pytest.fixture
def front_end(tmp_path, monkeypatch):
    """`dpp train` in an empty folder, without the training; returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_train", lambda chosen, settings: 0)

    def call(content, *overrides):
        (tmp_path / "run.yaml").write_bytes(content)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), limited_digits():
            code = kit.dpp("train", "run.yaml", *(f"--set={override}" for override in overrides))
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
        return code, said.getvalue()

    return call


def check_answer(code, said):
    """Valid settings without a word, or one line that a terminal can show."""
    assert code in (0, 2), said
    assert (said == "") == (code == 0)
    if code == 2:
        assert said.startswith("dpp: ") and said.endswith("\n") and len(said) < 2000, said
        assert said[:-1].isprintable(), said


@hypothesis.settings(seeded, max_examples=650)
@hypothesis.given(content=files)
def test_any_file_is_settings_or_one_line(front_end, content):
    check_answer(*front_end(content))


GOOD = b"name: run\nmodel: {kind: mlp}\ndata: {kind: digits}\ntraining: {steps: 5}\n"


@hypothesis.settings(seeded, max_examples=650)
@hypothesis.given(overrides=st.lists(words, min_size=1, max_size=2))
def test_any_override_is_a_setting_or_one_line(front_end, overrides):
    check_answer(*front_end(GOOD, *overrides))


SAMPLE = torch.zeros(4, 3)
LAYERS = [nn.Linear(3, 5), nn.Linear(5, 2)]
PLAN = partition(LAYERS, 2, "uniform", SAMPLE, device="cpu")
objects = hostile | st.sampled_from([SAMPLE, nn.ReLU(), len, Trainer, object(), b"x", {1}, 2j, torch.tensor(3), (1, 2)])
OF_TRAINER = sorted({*SCRIPT_NAMES.values(), *TRAINER_SECTIONS, "loss", "critic", "critic_target", "global_correction"})
OF_TRAINER += ["optimizer", "schedule", "device", "seed", "checkpoints", "observer"]
OF_TRAINER = [name for name in OF_TRAINER if name not in ("steps", "speeds", "memory")]
OF_PARTITION = ["stages", "by", "sample", "critic", "critic_target", "loss", "device", "speeds", "memory", "optimizer"]
OF_PARTITION += ["accumulate", "timeout_seconds"]


@hypothesis.settings(seeded, max_examples=450)
@hypothesis.given(options=st.dictionaries(st.sampled_from(OF_TRAINER), objects, min_size=1, max_size=2))
def test_any_option_of_a_trainer_is_taken_or_refused(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(UsageError), limited_digits():
        Trainer(PLAN, **{"device": "cpu"} | options)
    assert not list(tmp_path.iterdir())


@hypothesis.settings(seeded, max_examples=400)
@hypothesis.given(options=st.dictionaries(st.sampled_from(OF_PARTITION), objects, min_size=1, max_size=2))
def test_any_option_of_partition_is_taken_or_refused(options):
    given: dict[str, Any] = {"stages": 2, "by": "uniform", "sample": SAMPLE, "device": "cpu"} | options
    with contextlib.suppress(UsageError), limited_digits():
        partition(LAYERS, **given)
