"""Networks that are loaded from disk: a run folder, or an export of it, gives the trained module in evaluation mode."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import decoupled_pp as dpp
from decoupled_pp.commands.evaluate.finished_run import exit_module
from kit import check_said, refused, run_dpp
from kit import dpp as command

TEXT = "the stage learns, the link carries, the critic judges; " * 40
GPT = {"kind": "gpt", "width": 8, "depth": 2, "heads": 2}
GPT2 = {"kind": "huggingface", "type": "gpt2", "config": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}}
IDS = torch.arange(24).reshape(2, 12) + 97


def bpe(folder):
    """A byte-pair encoding of 300 entries, learned here, as a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "bpe.json"))
    return str(folder / "bpe.json")


def trained(folder, **sections):
    """The folder of a finished run."""
    (folder / "text.txt").write_text(TEXT)
    settings = {
        "name": "run",
        "runs": str(folder),
        "device": "cpu",
        "cut": "uniform",
        "model": GPT,
        "data": {"kind": "text", "files": [str(folder / "text.txt")], "context": 16, "batch_size": 4},
        "training": {"steps": 4},
        "logging": {"tensorboard": False},
    }
    settings["data"] |= sections.pop("data", {})
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | sections))
    assert run_dpp("train", folder / "run.yaml") == 0
    return folder / "run"


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "sections",
    [{}, {"stages": 1}, {"strategy": "backprop"}, {"model": GPT | {"dropout": 0.5}}],
    ids=["stages", "one stage", "baseline", "dropout"],
)
def test_a_run_and_its_export_are_the_trained_network(sections, tmp_path, capsys):
    run = trained(tmp_path, **sections)
    shutil.move(tmp_path / "text.txt", tmp_path / "gone.txt")  # the data need not be there
    assert run_dpp("export", run, "-o", tmp_path / "out") == 0
    before = torch.random.get_rng_state()
    from_run, from_export = dpp.load(run), dpp.load(str(tmp_path / "out"))
    assert torch.equal(torch.random.get_rng_state(), before)
    for module in (from_run, from_export):
        assert not any(part.training for part in module.modules())
        assert_equal(module.state_dict(), load_file(run / "model.safetensors"))
    assert torch.equal(from_run(IDS), from_export(IDS)) and from_run(IDS).shape == (2, 12, 256)
    said = capsys.readouterr().out
    assert f"model = dpp.load('{tmp_path / 'out'}')" in said and "T at most 16 -> (B, T, 256)" in said
    assert f"model = dpp.load('{tmp_path / 'out'}')" in (tmp_path / "out" / "README.md").read_text()


def test_the_lines_of_an_export_load_it(tmp_path):
    run_dpp("export", trained(tmp_path), "-o", tmp_path / "out")
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"ids": IDS}
    exec(lines, names)
    assert names["logits"].shape == (2, 12, 256)


def test_a_run_that_went_on_is_loaded_as_it_is_now(tmp_path):
    run = trained(tmp_path)
    before = dpp.load(run).state_dict()
    (run / "model.safetensors").unlink()
    assert_equal(dpp.load(run).state_dict(), before)
    assert run_dpp("train", tmp_path / "run.yaml", "--resume", "--set=training.steps=6") == 0
    assert not torch.equal(*(next(iter(state.values())) for state in (dpp.load(run).state_dict(), before)))


@pytest.mark.parametrize("critic", ["auto", "head", "auglocal"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_exported_exit_is_the_smaller_network(critic, place, tmp_path, capsys):
    run = trained(tmp_path, stages=3, critic={"kind": critic})
    wanted = exit_module(run, place)
    assert run_dpp("export", run, "--exit", place, "-o", tmp_path / "out") == 0
    shutil.move(tmp_path / "text.txt", tmp_path / "gone.txt")  # the data need not be there to load it
    found = dpp.load(tmp_path / "out")
    assert_equal(found.state_dict(), wanted.state_dict())
    assert torch.equal(found(IDS), wanted(IDS)) and not any(part.training for part in found.modules())
    assert sampled(tmp_path / "out", "--temperature=0").startswith("the link")
    assert run_dpp("export", tmp_path / "out", "-o", tmp_path / "again") == 0
    assert torch.equal(dpp.load(tmp_path / "again")(IDS), wanted(IDS))
    assert run_dpp("export", run, "-o", tmp_path / "out") == 0  # and the folder may hold the whole network next
    assert_equal(dpp.load(tmp_path / "out").state_dict(), load_file(run / "model.safetensors"))


def test_a_damaged_place_of_an_exit_is_refused(tmp_path):
    run = trained(tmp_path)
    run_dpp("export", run, "--exit=0", "-o", tmp_path / "out")
    for content in (
        "{",
        "[]",
        '{"stage": 0}',
        '{"stage": 2, "stages": 2, "layers": 1, "sample": [true, [[1], "int64"]]}',
    ):
        (tmp_path / "out" / "exit.json").write_text(content)
        with refused("exit-damaged"):
            dpp.load(tmp_path / "out")


@pytest.mark.slow
def test_an_exit_of_a_model_of_transformers_is_loaded(tmp_path):
    pytest.importorskip("transformers")
    run = trained(tmp_path, model=GPT2)
    wanted = exit_module(run, 0)
    assert run_dpp("export", run, "--exit=0", "-o", tmp_path / "out") == 0
    assert torch.equal(dpp.load(tmp_path / "out")(IDS), wanted(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"meta": True}])
def test_a_model_of_transformers_is_loaded_as_one(more, tmp_path):
    pytest.importorskip("transformers")
    run = trained(tmp_path, model=GPT2 | more, data={"tokenizer": bpe(tmp_path)})
    run_dpp("export", run, "-o", tmp_path / "out")
    from_run, from_export = dpp.load(run), dpp.load(tmp_path / "out")
    assert type(from_run).__name__ == type(from_export).__name__ == "GPT2LMHeadModel"
    assert torch.equal(from_run(IDS).logits, from_export(IDS).logits) and not from_export.training
    assert_equal(from_run.state_dict(), from_export.state_dict())
    assert sampled(run) == sampled(tmp_path / "out")


def sampled(folder, *options):
    """What `dpp sample` prints."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        assert run_dpp("sample", folder, "--prompt", "the link", "--tokens=12", *options) == 0
    return out.getvalue()


@pytest.mark.parametrize("tokenizer", [None, bpe], ids=["bytes", "bpe"])
def test_text_is_continued_with_the_tokenizer_that_the_export_holds(tokenizer, tmp_path):
    run = trained(tmp_path, data={"tokenizer": tokenizer and tokenizer(tmp_path)})
    run_dpp("export", run, "-o", tmp_path / "out")
    from_run = sampled(run)
    (tmp_path / "bpe.json").unlink(missing_ok=True)
    assert sampled(tmp_path / "out") == from_run
    assert from_run.startswith("the link") and len(from_run) > len("the link\n")
    assert sampled(tmp_path / "out", "--seed=1") != from_run
    likeliest = sampled(tmp_path / "out", "--temperature=0")
    assert sampled(tmp_path / "out", "--top-k=1") == likeliest == sampled(tmp_path / "out", "--top-k=1", "--seed=5")


def test_the_likeliest_text_is_the_networks(tmp_path):
    run = trained(tmp_path)
    module, ids = dpp.load(run), list(b"the link")
    for _ in range(12):
        ids.append(int(module(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    assert sampled(run, "--temperature=0") == bytes(ids).decode(errors="replace") + "\n"


def test_an_export_without_its_tokenizer_says_so(tmp_path, capsys):
    run = trained(tmp_path, data={"tokenizer": bpe(tmp_path)})
    (tmp_path / "bpe.json").unlink()
    assert command("export", run, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().err.startswith("dpp: exported without the tokenizer: ")
    assert_equal(dpp.load(tmp_path / "out").state_dict(), load_file(run / "model.safetensors"))


def test_nothing_of_others_is_overwritten(tmp_path, capsys):
    run, mine = trained(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    capsys.readouterr()
    assert command("export", run, "-o", mine) == 2
    check_said(capsys.readouterr().err, "not-an-output-folder", "no earlier export")
    assert [path.name for path in mine.iterdir()] == ["README.md"]
    assert command("export", run, "-o", tmp_path / "out") == command("export", run, "-o", tmp_path / "out") == 0
    weights = (run / "model.safetensors").read_bytes()
    shutil.copy(run / "model.safetensors", mine)  # of a model of another's, such folders have no settings of a run
    for folder in (mine, run):
        before = sorted(folder.iterdir())
        for options in ([], ["--exit=0"]):
            with refused("not-an-output-folder"):
                run_dpp("export", run, *options, "-o", folder)
        assert sorted(folder.iterdir()) == before and (folder / "model.safetensors").read_bytes() == weights


def test_what_holds_no_network_is_refused(tmp_path):
    with refused("not-a-run-folder", dpp.UsageError, str(tmp_path)):
        dpp.load(tmp_path)
    with refused("not-a-run-folder"):
        dpp.load(tmp_path / "model.safetensors")
    run = trained(tmp_path)
    shutil.rmtree(run / "checkpoints")
    weights = load_file(run / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "head" not in name}, run / "model.safetensors")
    with refused("weights-of-another-network"):
        dpp.load(run)
    (run / "model.safetensors").write_bytes(b"x")
    with refused("weights-not-readable"):
        dpp.load(run)
    (run / "model.safetensors").unlink()
    with refused("no-checkpoint"):
        dpp.load(run)


def test_only_text_is_continued(tmp_path):
    data = {"kind": "digits", "batch_size": 8}
    settings = {"name": "run", "runs": str(tmp_path), "model": {"kind": "mlp", "width": 4}, "data": data}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"training": {"steps": 1}}))
    assert run_dpp("train", tmp_path / "run.yaml") == 0
    with refused("sample-needs-text"):
        run_dpp("sample", tmp_path / "run", "--prompt", "x")
    with refused("option-out-of-range", dpp.UsageError, "--temperature nan"):
        run_dpp("sample", tmp_path / "run", "--prompt", "x", "--temperature", "nan")


def test_an_empty_prompt_is_refused(tmp_path):
    with refused("empty-prompt"):
        run_dpp("sample", trained(tmp_path), "--prompt", "")
