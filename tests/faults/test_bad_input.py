"""Bad input: one line that says why, exit code 2, nothing written, nothing lost; in one process and in ranks."""

from pathlib import Path

import pytest
import runs

import ranks

CASES = {
    "unknown key": ({"training.stepz": 3}, ["training.stepz", "unknown key", "'steps'"]),
    "missing key": ({"training": {}}, ["training.steps", "missing"]),
    "wrong type": ({"training.steps": "many"}, ["training.steps", "integer", "'many'"]),
    "fraction": ({"training.steps": 1.5}, ["training.steps", "integer", "1.5"]),
    "misspelt critic": ({"critic": {"kind": "haed"}}, ["critic.kind", "'haed'", "did you mean 'head'"]),
    "misspelt model": ({"model": {"kind": "mpl"}}, ["model.kind", "'mpl'", "did you mean 'mlp'"]),
    "misspelt data": ({"data": {"kind": "digit"}}, ["data.kind", "'digit'", "did you mean 'digits'"]),
    "misspelt cut": ({"cut": "tmie"}, ["cut", "'tmie'", "'time'"]),
    "misspelt optimizer": ({"optimizer": {"kind": "Adamm"}}, ["optimizer.kind", "'Adamm'", "AdamW"]),
    "misspelt loss": ({"loss": "xent"}, ["loss", "'xent'", "cross_entropy"]),
    "more stages than layers": ({"stages": 5, "cut": "uniform"}, ["`stages` is 5", "4 layers", "fewer stages"]),
    "cut that does not add up": ({"cut": [1, 1]}, ["`cut` [1, 1]", "adds up to 2", "has 4"]),
    "cut of other stages": ({"cut": [1, 1, 2]}, ["cut [1, 1, 2]", "2 entries"]),
    "empty stage": ({"cut": [0, 4]}, ["cut [0, 4]", "at least 1"]),
    "no capacity": ({"links.capacity": 0}, ["links.capacity", "greater than or equal to 1", "0"]),
    "no IDX files": ({"data": {"kind": "idx", "folder": "nowhere"}}, ["data.folder", "nowhere", "four IDX files"]),
    "truncated IDX": ({"data": {"kind": "idx", "folder": "idx"}}, ["train-images", "truncated", "fetch it again"]),
    "no CIFAR files": (
        {"data": {"kind": "cifar_binary", "folder": "nowhere"}},
        ["nowhere/data_batch_1.bin", "missing"],
    ),
    "truncated CIFAR": ({"data": {"kind": "cifar_binary", "folder": "cifar"}}, ["data_batch_1.bin", "5000 bytes"]),
    "no text files": ({"data": {"kind": "text", "files": ["nowhere/*.txt"]}}, ["nowhere/*.txt"]),
    "unwritable run folder": ({"runs": "/dev/null/x"}, ["/dev/null/x/run", "not a directory", "change `runs`"]),
    "run folder under a file": ({"runs": "run.yaml"}, ["run.yaml", "not a directory", "change `runs`"]),
    "no such module": (
        {"model": {"kind": "factory", "factory": "nowhere:f"}},
        ["model.factory", "nowhere:f", "import"],
    ),
    "no such function": (
        {"model": {"kind": "factory", "factory": "faulty:f"}},
        ["model.factory", "'faulty' has no 'f'"],
    ),
    "no function at all": ({"model": {"kind": "factory", "factory": "faulty"}}, ["'faulty'", "module:function"]),
    "module with an error": ({"model": {"kind": "factory", "factory": "broken:f"}}, ["broken:f", "SyntaxError"]),
    "arguments that do not fit": ({"model": runs.factory("misfit", widht=3)}, ["faulty:misfit", "widht"]),
    "factory of no layers": ({"model": runs.factory("no_layers")}, ["model.factory", "returned int"]),
    "layers that do not fit": ({"model": runs.factory("misfit")}, ["layer '2' (Linear)", "(16, 16)", "correct it"]),
    "layer of a dictionary": ({"model": runs.factory("returns_dictionary")}, ["layer '1' (Strange)", "dict"]),
    "model for other data": ({"model": {"kind": "gpt"}}, ["'gpt'", "tokens", "'image'"]),
    "critic of other outputs": ({"critic": runs.factory("critic_of_3_classes")}, ["stage 0", "(16, 3)", "(16, 10)"]),
    "critic of other inputs": ({"critic": runs.factory("critic_for_7_inputs")}, ["stage 0", "(16, 16)", "7x10"]),
    "critic that does not import": ({"critic": {"kind": "factory", "factory": "nowhere:f"}}, ["critic.factory"]),
    "critic of a listed cut": (
        {"critic": runs.factory("critic_of_3_classes"), "cut": [2, 2]},
        ["stage 0: critic Linear", "(16, 3)", "(16, 10)"],
    ),
    "optimizer arguments": ({"optimizer.arguments": {"momentun": 1}}, ["torch.optim.AdamW", "momentun"]),
    "loss of other targets": ({"loss": "mse"}, ["loss", "(16, 10)", "(16,)", "cross_entropy"]),
    "validation label that is no class": (
        {"data.factory": "faulty:mislabelled"},
        ["loss", "a validation target", "out of bounds"],
    ),
    "no validation batch": ({"data.factory": "faulty:nothing_held_out"}, ["no validation batch", "more data"]),
    "loss that is no scalar": ({"loss": "faulty:no_scalar"}, ["loss", "(16, 10)", "scalar"]),
    "sample of no text": ({"sample": {"tokens": 9}}, ["sample", "data.kind 'factory'", "leave sample out"]),
    "no such device": ({"device": "cuda"}, ["device: cuda", "found 0", "cpu"]),
}
COMMAND_LINES = {
    "no such file": (["nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    "no mapping": (["list.yaml"], ["list.yaml", "mapping", "list"]),
    "no YAML": (["open.yaml"], ["open.yaml is not YAML"]),
    "override without a value": (["run.yaml", "--set=training.steps"], ["'training.steps'", "key.sub=value"]),
    "override that is no YAML": (["run.yaml", "--set=model={"], ["'model={'", "not YAML"]),
    "other ranks than stages": (["run.yaml", "--ranks=3"], ["stages is 2", "not 3"]),
    "no ranks": (["run.yaml", "--ranks=0"], ["stages is 2", "not 0"]),
    "fewer restarts than none": (["run.yaml", "--ranks=2", "--max-restarts=-1"], ["--max-restarts -1", "at least 0"]),
    "restarts of one process": (["run.yaml", "--max-restarts=5"], ["--max-restarts 5", "--ranks 2"]),
    "both ways": (["run.yaml", "--resume", "--overwrite"], ["--resume", "--overwrite", "contradict"]),
    "unknown option": (["run.yaml", "--resum=3"], ["--resum", "dpp"]),
    "no checkpoint": (["run.yaml", "--set=name=new", "--resume"], ["runs/new", "no checkpoint", "without --resume"]),
}
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
        runs.write_settings(optimizer={"kind": "AdamW", "arguments": {}})
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
        assert runs.dpp("train", "run.yaml") == 0
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def _overrides(case):
    return [runs.override(key, value) for key, value in CASES[case][0].items()]


def _check_line(text, words):
    assert text.startswith("dpp: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("case", CASES)
def test_bad_settings_are_one_line_and_touch_nothing(case, here, capsys):
    before = runs.fingerprint(here)
    # What is there must survive --overwrite, and what is not there must not come to be.
    for way in (["--overwrite"], ["--set=name=new"]):
        assert runs.dpp("train", "run.yaml", *_overrides(case), *way) == 2
        printed = capsys.readouterr()
        _check_line(printed.err.replace("runs/new", "runs/run").replace("x/new", "x/run"), CASES[case][1])
        assert printed.out == ""
        assert runs.fingerprint(here) == before and not Path("runs/new").exists()


def test_a_held_out_text_that_a_tokenizer_makes_too_short_touches_nothing(tmp_path, monkeypatch, capsys):
    """How many tokens a text has is only known when it has been read; as bytes this one would do."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save("words.json")
    Path("short.txt").write_text("word " * 500)
    data = {"kind": "text", "files": ["short.txt"], "tokenizer": "words.json", "context": 64, "batch_size": 2}
    runs.write_settings(data=data, model={"kind": "gpt", "width": 8, "depth": 2, "heads": 2})
    assert runs.dpp("train", "run.yaml") == 2
    _check_line(capsys.readouterr().err, ["the validation text has", "`data.context` 64"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_bad_command_lines_are_one_line_and_touch_nothing(case, here, capsys):
    before = runs.fingerprint(here)
    arguments, words = COMMAND_LINES[case]
    assert runs.dpp("train", *arguments) == 2
    _check_line(capsys.readouterr().err, words)
    assert runs.fingerprint(here) == before and not Path("runs/new").exists()


@pytest.mark.parametrize("arguments", [[], ["--ranks=2"]])
def test_a_run_folder_that_exists_is_refused(arguments, here, capsys):
    before = runs.fingerprint(here)
    assert runs.dpp("train", "run.yaml", *arguments) == 2
    _check_line(capsys.readouterr().err, ["runs/run exists", "--resume", "--overwrite"])
    assert runs.fingerprint(here) == before


def test_a_folder_that_is_no_run_is_never_overwritten(here, capsys):
    assert runs.dpp("train", "run.yaml", "--overwrite", "--set=runs=.", "--set=name=idx") == 2
    _check_line(capsys.readouterr().err, ["idx", "no run folder", "not overwritten"])
    assert Path("idx/train-images-idx3-ubyte").exists()


def test_overwrite_starts_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.write_settings()
    assert runs.dpp("train", "run.yaml") == 0
    (runs.FOLDER / "old").touch()
    assert runs.dpp("train", "run.yaml", "--overwrite", "--set=training.steps=2") == 0
    assert not (runs.FOLDER / "old").exists() and runs.checkpoint_steps() == [2]


@pytest.mark.parametrize("case", FOUND_IN_DIFFERENT_PLACES)
def test_ranks_say_it_once_and_touch_nothing(case, here, tmp_path):
    before = runs.fingerprint(here)
    arguments = ["train", "run.yaml", *_overrides(case), "--overwrite"]
    size = 5 if case == "more stages than layers" else 2
    results = ranks.launch(runs.dpp_in_rank, str(here), *arguments, size=size, folder=tmp_path)
    assert ranks.values(results) == [2] * size
    _check_line("".join(result.output for result in results), CASES[case][1])
    assert runs.fingerprint(here) == before


def test_a_fault_of_the_middle_rank_alone_is_said_once(here, tmp_path):
    before = runs.fingerprint(here)
    overrides = [
        runs.override("critic", runs.factory("critic_of_stage_0_only")),
        "--set=stages=3",
        "--set=cut=[1, 1, 2]",
        "--set=model.width=64",
    ]
    arguments = ["train", "run.yaml", *overrides, "--overwrite"]
    results = ranks.launch(runs.dpp_in_rank, str(here), *arguments, size=3, folder=tmp_path)
    assert ranks.values(results) == [2, 2, 2]
    _check_line("".join(result.output for result in results), ["stage 1: critic Linear", "(16, 64)", "65x10"])
    assert runs.fingerprint(here) == before


def test_other_ranks_than_stages_under_a_launcher(here, tmp_path):
    results = ranks.launch(runs.dpp_in_rank, str(here), "train", "run.yaml", "--overwrite", size=3, folder=tmp_path)
    assert ranks.values(results) == [2, 2, 2]
    _check_line("".join(result.output for result in results), ["stages is 2", "not 3"])


@pytest.mark.slow
def test_launched_ranks_say_it_once(here):
    """`--ranks` itself: the fault is found in a rank, and no other rank, launcher or restart adds a line."""
    before = runs.fingerprint(here)
    command = runs.Command(
        "decoupled_pp", "train", "run.yaml", "--ranks=2", "--max-restarts=2", "--overwrite", *_overrides(LATE)
    )
    code, errors = command.wait()
    assert code == 2
    _check_line(errors, CASES[LATE][1])
    assert runs.fingerprint(here) == before


LATE = "critic of a listed cut"


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
    code, errors = runs.Command("torch.distributed.run", *words).wait()
    assert code == 1  # torchrun's own
    assert len(runs.said(errors)) == 1 and "training.stepz" in runs.said(errors)[0]
    assert "decoupled_pp/" not in errors.partition("torch.distributed.elastic")[0]  # no traceback of ours
