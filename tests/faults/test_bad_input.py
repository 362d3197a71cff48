"""Bad input: one line that says why, exit code 2, nothing written, nothing lost; in one process and in ranks."""

from pathlib import Path

import pytest

import launched
import ranks
from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.load import load_settings
from decoupled_pp.training.job import run_rank
from kit import check_said, refused

CASES = {
    "unknown key": ({"training.stepz": 3}, "unknown-setting", ["3", "'steps'"]),
    "missing key": ({"training": {}}, "missing-setting", []),
    "wrong type": ({"training.steps": "many"}, "unusable-value", ["'many'"]),
    "fraction": ({"training.steps": 1.5}, "unusable-value", ["1.5"]),
    "misspelt critic": ({"critic": {"kind": "haed"}}, "unknown-kind", ["'haed'", "did you mean 'head'"]),
    "misspelt model": ({"model": {"kind": "mpl"}}, "unknown-kind", ["'mpl'", "did you mean 'mlp'"]),
    "misspelt data": ({"data": {"kind": "digit"}}, "unknown-kind", ["'digit'", "did you mean 'digits'"]),
    "misspelt cut": ({"cut": "tmie"}, "not-one-of-the-choices", ["'tmie'", "did you mean 'time'"]),
    "misspelt optimizer": ({"optimizer": {"kind": "Adamm"}}, "unknown-optimizer", ["'Adamm'", "AdamW"]),
    "misspelt loss": ({"loss": "xent"}, "unknown-kind", ["'xent'", "cross_entropy"]),
    "more stages than layers": ({"stages": 5, "cut": "uniform"}, "too-few-layers", ["5", "4 layers"]),
    "cut that does not add up": ({"cut": [1, 1]}, "bad-cut", ["[1, 1]", "2 layers", "has 4"]),
    "cut of other stages": ({"cut": [1, 1, 2]}, "contradictory-settings", ["[1, 1, 2]", "2 entries"]),
    "empty stage": ({"cut": [0, 4]}, "contradictory-settings", ["[0, 4]"]),
    "no capacity": ({"links.capacity": 0}, "unusable-value", ["not 0"]),
    "no IDX files": ({"data": {"kind": "idx", "folder": "nowhere"}}, "data-file-missing", ["nowhere"]),
    "truncated IDX": ({"data": {"kind": "idx", "folder": "idx"}}, "data-file-damaged", ["train-images"]),
    "no CIFAR files": (
        {"data": {"kind": "cifar_binary", "folder": "nowhere"}},
        "data-file-missing",
        ["nowhere/data_batch_1.bin"],
    ),
    "truncated CIFAR": (
        {"data": {"kind": "cifar_binary", "folder": "cifar"}},
        "data-file-damaged",
        ["data_batch_1.bin", "5000 bytes"],
    ),
    "no text files": ({"data": {"kind": "text", "files": ["nowhere/*.txt"]}}, "data-file-missing", ["nowhere/*.txt"]),
    "unwritable run folder": ({"runs": "/dev/null/x"}, "output-not-writable", ["/dev/null/x/"]),
    "run folder under a file": ({"runs": "run.yaml"}, "output-not-writable", ["run.yaml"]),
    "no such module": ({"model": {"kind": "factory", "factory": "nowhere:f"}}, "factory-not-importable", ["nowhere:f"]),
    "no such function": ({"model": {"kind": "factory", "factory": "faulty:f"}}, "factory-missing", ["'faulty'", "'f'"]),
    "no function at all": ({"model": {"kind": "factory", "factory": "faulty"}}, "factory-unreadable", ["'faulty'"]),
    "module with an error": (
        {"model": {"kind": "factory", "factory": "broken:f"}},
        "factory-not-importable",
        ["broken:f", "SyntaxError"],
    ),
    "arguments that do not fit": (
        {"model": launched.factory("misfit", widht=3)},
        "factory-arguments",
        ["faulty:misfit", "widht"],
    ),
    "factory of no layers": ({"model": launched.factory("no_layers")}, "factory-wrong-result", ["int"]),
    "layers that do not fit": (
        {"model": launched.factory("misfit")},
        "layer-shape-mismatch",
        ["layer '2' (Linear)", "(16, 16)"],
    ),
    "layer of a dictionary": (
        {"model": launched.factory("returns_dictionary")},
        "layer-shape-mismatch",
        ["layer '2' (Linear)", "dict"],
    ),
    "model for other data": ({"model": {"kind": "gpt"}}, "model-data-mismatch", ["'gpt'", "tokens", "'image'"]),
    "critic of other outputs": (
        {"critic": launched.factory("critic_of_3_classes")},
        "critic-wrong-output",
        ["stage 0", "(16, 3)", "(16, 10)"],
    ),
    "critic of other inputs": (
        {"critic": launched.factory("critic_for_7_inputs")},
        "critic-fails",
        ["stage 0", "(16, 16)", "7x10"],
    ),
    "critic that does not import": (
        {"critic": {"kind": "factory", "factory": "nowhere:f"}},
        "factory-not-importable",
        ["nowhere:f"],
    ),
    "critic of a listed cut": (
        {"critic": launched.factory("critic_of_3_classes"), "cut": [2, 2]},
        "critic-wrong-output",
        ["stage 0", "(16, 3)", "(16, 10)"],
    ),
    "optimizer arguments": (
        {"optimizer.arguments": {"momentun": 1}},
        "optimizer-refuses-arguments",
        ["torch.optim.AdamW"],
    ),
    "loss of other targets": ({"loss": "mse"}, "loss-does-not-fit-targets", ["(16, 10)", "(16,)"]),
    "validation label that is no class": (
        {"data.factory": "faulty:mislabelled"},
        "target-out-of-range",
        ["Target", "out of bounds"],
    ),
    "no validation batch": ({"data.factory": "faulty:nothing_held_out"}, "no-batch", ["validation"]),
    "loss that is no scalar": ({"loss": "faulty:no_scalar"}, "loss-is-no-scalar", ["(16, 10)"]),
    "network larger than memory": ({"model": {"kind": "mlp", "width": 10**6}}, "network-exceeds-memory", ["narrower"]),
    "sample of no text": ({"sample": {"tokens": 9}}, "sample-needs-text", ["factory"]),
    "no such device": ({"device": "cuda"}, "too-few-gpus", ["found 0"]),
}
"""Name -> change of good settings, code of the fault, and the values that its text must hold."""

COMMAND_LINES = {
    "no such file": (["nowhere.yaml"], "configuration-unreadable", ["nowhere.yaml", "No such file"]),
    "no mapping": (["list.yaml"], "configuration-is-no-mapping", ["list.yaml", "list"]),
    "no YAML": (["open.yaml"], "configuration-is-no-yaml", ["open.yaml"]),
    "override without a value": (["run.yaml", "--set=training.steps"], "override-unreadable", ["'training.steps'"]),
    "override that is no YAML": (["run.yaml", "--set=model={"], "override-unreadable", ["'model={'"]),
    "other ranks than stages": (["run.yaml", "--ranks=3"], "ranks-do-not-fit-stages", ["2 stages", "not 3"]),
    "no ranks": (["run.yaml", "--ranks=0"], "ranks-do-not-fit-stages", ["2 stages", "not 0"]),
    "fewer restarts than none": (
        ["run.yaml", "--ranks=2", "--max-restarts=-1"],
        "option-out-of-range",
        ["--max-restarts -1"],
    ),
    "restarts of one process": (["run.yaml", "--max-restarts=5"], "option-without-effect", ["--max-restarts 5"]),
    "both ways": (["run.yaml", "--resume", "--overwrite"], "resume-and-overwrite", ["--resume", "--overwrite"]),
    "unknown option": (["run.yaml", "--resum=3"], "bad-command-line", ["--resum"]),
    "no checkpoint": (["run.yaml", "--set=name=new", "--resume"], "nothing-to-resume", ["runs/new"]),
}
"""Name -> arguments of `dpp train`, code of the fault, and the values that its text must hold."""

FOUND_IN_DIFFERENT_PLACES = [
    "unknown key",  # before the ranks have met
    "misspelt optimizer",  # by every rank
    "truncated IDX",  # by rank 0, which alone reads data
    "more stages than layers",  # by rank 0, which cuts for all
    "cut that does not add up",
    "layers that do not fit",
    "module with an error",
    "critic of a listed cut",  # by the critic's own rank
    "loss of other targets",
    "unwritable run folder",
    "no such device",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run and damaged data."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        launched.write_settings(optimizer={"kind": "AdamW", "arguments": {}})
        Path("list.yaml").write_text("- a\n")
        Path("open.yaml").write_text("a: [\n")
        Path("broken.py").write_text("def f(:\n")
        Path("idx").mkdir()
        for part in ("train", "t10k"):
            header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 8, 8))
            Path(f"idx/{part}-images-idx3-ubyte").write_bytes(header + bytes(600))
            Path(f"idx/{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10]) + bytes(10))
        Path("cifar").mkdir()
        for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
            Path("cifar", name).write_bytes(bytes(5000))
        assert launched.dpp("train", "run.yaml") == 0
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def _overrides(case):
    return [launched.override(key, value) for key, value in CASES[case][0].items()]


@pytest.mark.parametrize("case", CASES)
def test_bad_settings_are_one_line_and_touch_nothing(case, here, capsys):
    """A run that is there survives --overwrite, and one that is not there does not come to be."""
    before = launched.fingerprint(here)
    _, code, parts = CASES[case]
    overrides = tuple(override.removeprefix("--set=") for override in _overrides(case))
    with refused(code, UsageError, *parts) as caught:
        run_rank(load_settings("run.yaml", overrides), overwrite=True)
    assert launched.fingerprint(here) == before
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml", *_overrides(case), "--set=name=new") == 2
    printed = capsys.readouterr()
    assert printed.err.replace("runs/new", "runs/run").replace("/new", "/run") == f"dpp: {caught.value}\n"
    assert not launched.said(printed.out)  # the phases of the start, and no fault
    assert launched.fingerprint(here) == before and not Path("runs/new").exists()


def test_a_held_out_text_that_a_tokenizer_makes_too_short_touches_nothing(tmp_path, monkeypatch, capsys):
    """How many tokens a text has is only known when it has been read; as bytes this one would do."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save("words.json")
    Path("short.txt").write_text("word " * 500)
    data = {"kind": "text", "files": ["short.txt"], "tokenizer": "words.json", "context": 64, "batch_size": 2}
    launched.write_settings(data=data, model={"kind": "gpt", "width": 8, "depth": 2, "heads": 2})
    assert launched.dpp("train", "run.yaml") == 2
    check_said(capsys.readouterr().err, "too-little-data", "`data.context` 64")
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_bad_command_lines_are_one_line_and_touch_nothing(case, here, capsys):
    before = launched.fingerprint(here)
    arguments, code, parts = COMMAND_LINES[case]
    assert launched.dpp("train", *arguments) == 2
    check_said(capsys.readouterr().err, code, *parts)
    assert launched.fingerprint(here) == before and not Path("runs/new").exists()


@pytest.mark.parametrize("arguments", [[], ["--ranks=2"]])
def test_a_run_folder_that_exists_is_refused(arguments, here, capsys):
    before = launched.fingerprint(here)
    assert launched.dpp("train", "run.yaml", *arguments) == 2
    check_said(capsys.readouterr().err, "output-exists", "runs/run")
    assert launched.fingerprint(here) == before


def test_a_folder_that_is_no_run_is_never_overwritten(here, capsys):
    assert launched.dpp("train", "run.yaml", "--overwrite", "--set=runs=.", "--set=name=idx") == 2
    check_said(capsys.readouterr().err, "not-an-output-folder", "idx")
    assert Path("idx/train-images-idx3-ubyte").exists()


def test_overwrite_starts_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launched.write_settings()
    assert launched.dpp("train", "run.yaml") == 0
    (launched.FOLDER / "also-old.json").touch()
    assert launched.dpp("train", "run.yaml", "--overwrite", "--set=training.steps=2") == 0
    assert not (launched.FOLDER / "also-old.json").exists() and launched.checkpoint_steps() == [2]


def _said(results):
    """What all ranks said of the fault; their outputs hold the phases of the start as well."""
    return "".join(f"{line}\n" for result in results for line in launched.said(result.output))


@pytest.mark.parametrize("case", FOUND_IN_DIFFERENT_PLACES)
def test_ranks_say_it_once_and_touch_nothing(case, here, tmp_path):
    before = launched.fingerprint(here)
    arguments = ["train", "run.yaml", *_overrides(case), "--overwrite"]
    size = 5 if case == "more stages than layers" else 2
    results = ranks.launch(launched.dpp_in_rank, str(here), *arguments, size=size, folder=tmp_path)
    assert ranks.values(results) == [2] * size
    _, code, parts = CASES[case]
    check_said(_said(results), code, *parts)
    assert launched.fingerprint(here) == before


def test_a_fault_of_the_middle_rank_alone_is_said_once(here, tmp_path):
    before = launched.fingerprint(here)
    overrides = [
        launched.override("critic", launched.factory("critic_of_stage_0_only")),
        "--set=stages=3",
        "--set=cut=[1, 1, 2]",
        "--set=model.width=64",
    ]
    arguments = ["train", "run.yaml", *overrides, "--overwrite"]
    results = ranks.launch(launched.dpp_in_rank, str(here), *arguments, size=3, folder=tmp_path)
    assert ranks.values(results) == [2, 2, 2]
    check_said(_said(results), "critic-fails", "stage 1", "(16, 64)", "65x10")
    assert launched.fingerprint(here) == before


def test_other_ranks_than_stages_under_a_launcher(here, tmp_path):
    results = ranks.launch(launched.dpp_in_rank, str(here), "train", "run.yaml", "--overwrite", size=3, folder=tmp_path)
    assert ranks.values(results) == [2, 2, 2]
    check_said(_said(results), "ranks-do-not-fit-stages", "2 stages", "not 3")


@pytest.mark.slow
def test_launched_ranks_say_it_once(here):
    """`--ranks` itself: the fault is found in a rank, and no other rank, launcher or restart adds a line."""
    before = launched.fingerprint(here)
    command = launched.Command(
        "decoupled_pp", "train", "run.yaml", "--ranks=2", "--max-restarts=2", "--overwrite", *_overrides(LATE)
    )
    code, errors = command.wait()
    assert code == 2
    _, fault, parts = CASES[LATE]
    check_said(errors, fault, *parts)
    assert launched.fingerprint(here) == before


LATE = "critic of a listed cut"


@pytest.mark.slow
def test_ranks_of_a_script_say_it_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(
        "import torch, decoupled_pp as dpp\n"
        "layers = [torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)]\n"
        "plan = dpp.partition(layers, 2, 'uniform', torch.zeros(4, 3), device='cpu')\n"
        "dpp.Trainer(plan, device='cpu', clip_norm=-1)\n"
    )
    words = ["--nproc-per-node=2", "--standalone", "train.py"]
    code, errors = launched.Command("torch.distributed.run", *words).wait()
    assert code == 1  # torchrun's own
    assert errors.count("train.py") - errors.count("train.py FAILED") == 1  # one traceback, beside torchrun's own
    assert errors.count("UsageError: `clip_norm`: Input should be greater than 0, not -1") == 1


@pytest.mark.slow
def test_torchrun_adds_only_its_own_report(here):
    words = [
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "decoupled_pp",
        "train",
        "run.yaml",
        *_overrides("unknown key"),
    ]
    code, errors = launched.Command("torch.distributed.run", *words).wait()
    assert code == 1  # torchrun's own
    assert len(launched.said(errors)) == 1 and "training.stepz" in launched.said(errors)[0]
    assert "decoupled_pp/" not in errors.partition("torch.distributed.elastic")[0]  # no traceback of ours
