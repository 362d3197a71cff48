"""All that the pages name exists, generated pages and pictures are up to date, and the runnable snippets run."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import decoupled_pp
from decoupled_pp.commands.main import build_parser
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.reference import reference
from decoupled_pp.training.job import run_rank

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("src/", "docs/", "tests/", "configs/", "launch/", "examples/")

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
def test_public_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not [name for name in re.findall(r"\bdpp\.(\w+)", text) if name not in decoupled_pp.__all__]


@every_page
def test_settings_exist(page):
    keys = _settings()
    sections = {key.split(".")[0] for key in keys}
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", page.read_text(encoding="utf-8")))
    files = {"py", "md", "json", "jsonl", "yaml", "safetensors", "png"}
    unknown = [name for name in named - keys if name.split(".")[0] in sections and name.split(".")[1] not in files]
    assert not unknown


def _settings():
    """Returns `section.key` of every setting, from the configuration reference."""
    keys = {"model.kind", "data.kind", "critic.kind", "critic_target.kind"}
    section = None
    for line in reference().splitlines():
        if heading := re.match(r"##+ `(\w+)", line):
            section = heading[1]
        elif section and (row := re.match(r"\| `(\w+)` \|", line)):
            keys.add(f"{section}.{row[1]}")
    return keys


@every_page
def test_make_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^\s*|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.findall(r"^make ([a-z-]+) ", listed, flags=re.MULTILINE) == targets


@every_page
def test_commands_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    wrong = []
    for line in re.findall(r"\bdpp ((?:train|evaluate|export|compare|sweep|plan|bench|[a-z]+ -)[^`#\n]*)", text):
        words = line.split()
        known = _flags(words)
        if known is None:
            wrong.append(line)
        else:
            wrong += [f"{line}: {flag}" for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line) if flag not in known]
    assert not wrong


def _flags(words):
    """The flags of a `dpp` command, named by its first words; None if there is no such command."""
    parser = build_parser()
    while subcommands := [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]:
        if not words:
            break
        parser = subcommands[0].choices.get(words.pop(0))
        if parser is None:
            return None
    return {flag for action in parser._actions for flag in action.option_strings}


def test_every_room_is_named():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.name for path in (ROOT / "src" / "decoupled_pp").iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) == 10
    assert not [room for room in rooms if f"`{room}/" not in text]


@pytest.mark.parametrize(
    ("index", "parts"), [("docs", "*.md"), ("docs/results", "*/README.md"), ("examples", "*.py")], ids=str
)
def test_the_index_is_complete(index, parts):
    text = (ROOT / index / "README.md").read_text(encoding="utf-8")
    files = [str(path.relative_to(ROOT / index)) for path in (ROOT / index).glob(parts)]
    assert not [file for file in files if file != "README.md" and f"]({file})" not in text]


def test_the_picture_is_what_its_script_draws():
    folder = ROOT / "docs" / "pictures"
    script = [sys.executable, str(folder / "draw_idea.py")]
    drawn = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True).stdout
    assert drawn == (folder / "idea.svg").read_text(encoding="utf-8"), "run: make pictures"
    assert "prefers-color-scheme: dark" in drawn


def test_citation_names_every_paper_with_its_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == decoupled_pp.__version__
    assert all(citation[key] for key in ("message", "title", "authors", "license"))
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year", "notes"} <= set(paper), paper["title"]
        assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])
    cited = {paper["url"].rsplit("/", 1)[1] for paper in citation["references"] if "arxiv" in paper.get("url", "")}
    sources = [
        *(ROOT / "src/decoupled_pp/critics").glob("*.py"),
        *(ROOT / "src/decoupled_pp/pipeline/rules").glob("*.py"),
    ]
    named = {number for file in sources for number in re.findall(r"\b\d{4}\.\d{5}\b", file.read_text(encoding="utf-8"))}
    assert named <= cited


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
