"""What README and docs name exists, the configuration reference is up to date, and the runnable snippets run."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

from decoupled_pp.commands.main import _parser
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.reference import reference
from decoupled_pp.training.job import run_rank

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("src/", "docs/", "tests/", "configs/", "launch/")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_configuration_reference_is_up_to_date():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m decoupled_pp.settings.reference > docs/configuration.md"


@every_page
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {
        word.rstrip("/") for word in re.findall(r"(?<![\w./<-])[\w.-]+/[\w./-]*\w", text) if word.startswith(FOLDERS)
    }
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing


@every_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        if not aim.exists() or (anchor and anchor not in _anchors(aim)):
            broken.append(target)
    assert not broken


def _anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_python_names_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = [name for name in set(re.findall(r"\bdecoupled_pp(?:\.\w+)+", text)) if not _exists(name)]
    assert not missing


def _exists(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@every_page
def test_commands_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    wrong = []
    for line in re.findall(r"\bdpp ((?:train|evaluate|export|plan|bench|[a-z]+ -)[^`#\n]*)", text):
        words = line.split()
        known = _flags(words)
        if known is None:
            wrong.append(line)
        else:
            wrong += [f"{line}: {flag}" for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line) if flag not in known]
    assert not wrong


def _flags(words):
    """The flags of a `dpp` command, named by its first words; None if there is no such command."""
    parser = _parser()
    while subcommands := [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]:
        if not words:
            break
        parser = subcommands[0].choices.get(words.pop(0))
        if parser is None:
            return None
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_every_room_is_named(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rooms = [path.name for path in (ROOT / "src" / "decoupled_pp").iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) == 10
    assert not [room for room in rooms if not re.search(rf"(`|-- ){room}/", text)]


def _snippets(language):
    text = (ROOT / "docs" / "bring-your-own-model.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _file_name(snippet):
    first = snippet.splitlines()[0]
    return first.removeprefix("# ") if re.fullmatch(r"# \w+\.(py|yaml)", first) else None


def test_the_scripts_run():
    scripts = [snippet for snippet in _snippets("python runnable") if _file_name(snippet) is None]
    assert scripts
    for script in scripts:
        exec(compile(script, "bring-your-own-model.md", "exec"), {"__name__": "__main__"})


def test_the_factories_run_together(tmp_path, monkeypatch):
    files = {_file_name(s): s for s in [*_snippets("python runnable"), *_snippets("yaml")] if _file_name(s) is not None}
    assert len(files) == 6
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    outcome = run_rank(load_settings("mine.yaml"))
    assert outcome.report.steps == 30
    assert outcome.report.exits[-1].val_accuracy > 0.5
