"""Exports the network of a run: its weights, and beside them what `dpp.load` needs and a page that says how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from decoupled_pp.commands.evaluate.finished_run import exit_module, open_exit
from decoupled_pp.commands.terminal import say
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.vocabulary import open_vocabulary
from decoupled_pp.models.transformers_export import export_transformers
from decoupled_pp.run.checkpoints.files import cannot_write
from decoupled_pp.run.checkpoints.shards import write_shards
from decoupled_pp.run.checkpoints.weights import export_safetensors
from decoupled_pp.run.early_exit import EXIT_FILE
from decoupled_pp.run.folder import CHECKPOINTS, CONFIG_FILE, INFO_FILE, SETTINGS, WEIGHTS_FILE
from decoupled_pp.run.in_progress import JOB_FILE
from decoupled_pp.run.output_folder import mapping_in
from decoupled_pp.run.saved import TOKENIZER_FILE, TRANSFORMERS_FILE, Saved, open_saved
from decoupled_pp.settings.sections import HuggingFaceModel

CARD_FILE = "README.md"


def export_run(run: Path, output: Path, *, exit: int | None = None, tied: bool = False) -> list[str]:
    """Write the newest weights of a run as plain safetensors; the data need not be there any more.

    A file if `output` is called `*.safetensors`, else a folder that `dpp.load` loads, of a `transformers` model one for
    `from_pretrained`, too. There `tied` makes weights that were tied one again. `exit` writes the smaller network of
    that exit, for which the data must be there.

    Returns:
        For a folder, the lines of Python that load it.
    """
    is_file = output.suffix == ".safetensors"
    if exit is not None and is_file:
        export_safetensors(exit_module(run, exit), output)
        return []
    saved = open_saved(run)
    model = saved.settings.model
    as_transformers = isinstance(model, HuggingFaceModel) and exit is None and saved.early_exit is None
    if tied and (is_file or not as_transformers):
        raise UsageError(
            "--tied works only where a transformers model is exported as a folder; leave it out",
            code="tied-needs-transformers-folder",
        )
    if is_file:
        export_safetensors(_filled(saved), output)
        return []
    _make_folder(output, as_transformers=as_transformers)
    if exit is not None:
        place, module = open_exit(run, exit)
        saved = replace(saved, early_exit=place)
        export_safetensors(module, output / WEIGHTS_FILE)
    elif as_transformers:
        _export_transformers(saved, output, tied=tied)
    else:
        export_safetensors(_filled(saved), output / WEIGHTS_FILE)
    return _complete(saved, output)


def _filled(saved: Saved) -> nn.Module:
    module = saved.build()
    saved.fill(module)
    return module


def _make_folder(output: Path, *, as_transformers: bool) -> None:
    """Make the folder, or take over one of an earlier export; others hold files that must not be overwritten."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()) and not _is_export(output, as_transformers=as_transformers):
            raise UsageError(
                f"{output} exists and is no earlier export of this kind, so nothing in it is overwritten; give "
                "another -o",
                code="not-an-output-folder",
            )
    except OSError as error:
        raise cannot_write(output, error, "folder") from error


def _is_export(folder: Path, *, as_transformers: bool) -> bool:
    # Weights alone prove nothing: run folders and models of others hold `model.safetensors`, too.
    is_one = (folder / INFO_FILE).is_file() and mapping_in(folder / CONFIG_FILE, SETTINGS)
    is_run = (folder / JOB_FILE).exists() or (folder / CHECKPOINTS).exists()
    return is_one and not is_run and (folder / TRANSFORMERS_FILE).exists() == as_transformers


def _export_transformers(saved: Saved, output: Path, *, tied: bool) -> None:
    def write(target: Path, names: Mapping[str, str], instead: Mapping[str, str]) -> object:
        return write_shards(saved.checkpoint or saved.folder / CHECKPOINTS, target, names, instead)

    model = saved.settings.model
    assert isinstance(model, HuggingFaceModel), "others are no models of transformers"
    tokenizer = getattr(saved.settings.data, "tokenizer", None)
    export_transformers(model, saved.info, saved.fill, write, output, tied=tied, tokenizer=tokenizer)


def _complete(saved: Saved, output: Path) -> list[str]:
    """Write settings, data, tokenizer and README.md beside the weights; return the lines that load them."""
    lines = ["import decoupled_pp as dpp", f"model = dpp.load({str(output)!r})", _call(saved.info)]
    texts = {name: (saved.folder / name).read_text(encoding="utf-8") for name in (CONFIG_FILE, INFO_FILE)}
    definition = None if (output / TRANSFORMERS_FILE).is_file() else _tokenizer(saved)
    if definition is not None:
        texts[TOKENIZER_FILE] = definition
    if saved.early_exit is not None:
        texts[EXIT_FILE] = saved.early_exit.text()
    texts[CARD_FILE] = _card(saved, output, lines)
    try:
        for name, text in texts.items():
            (output / name).write_text(text, encoding="utf-8")
        if saved.early_exit is None:  # the export before may have been of an exit
            (output / EXIT_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(output, error, "folder") from error
    return lines


def _tokenizer(saved: Saved) -> str | None:
    """Return the content of a tokenizer.json of the run's data; None for bytes, and where it is gone."""
    try:
        return open_vocabulary(getattr(saved.settings.data, "tokenizer", None)).definition
    except UsageError as error:  # the weights are worth having without it
        say(f"exported without the tokenizer: {error}")
        return None


def _call(info: DataInfo) -> str:
    """Return a line of Python that calls the network, with the shapes of what it takes and returns."""
    if info.form in ("tokens", "masked_tokens"):
        return f"logits = model(ids)  # int64 (B, T), T at most {info.shape[0]} -> (B, T, {info.outputs})"
    if info.form == "sentences":
        return f"logits = model((ids, mask))  # int64 and bool (B, T), T at most {info.shape[0]} -> (B, {info.outputs})"
    shape = ", ".join(map(str, ("B", *info.shape)))
    return f"outputs = model(inputs)  # ({shape}), prepared as `data` in config.yaml does -> (B, {info.outputs})"


def _card(saved: Saved, output: Path, lines: list[str]) -> str:
    settings = saved.settings
    text = f"""# {settings.name}

A network of kind `{settings.model.kind}`, trained by decoupled_pp on data of kind `{settings.data.kind}`. In Python:

```python
{chr(10).join(lines)}
```

`dpp.load` returns a plain `nn.Module` in evaluation mode. `model.safetensors` holds its weights under their
own names, `config.yaml` the settings it was trained with, and `data.json` what its data were like.
"""
    if (place := saved.early_exit) is not None:
        text += f"\nIt ends at exit {place.stage} of a network of {place.stages} stages ({EXIT_FILE}).\n"
    if saved.info.form == "tokens":
        text += f'\nText from it: `dpp sample {output} --prompt "..."`.\n'
    return text
