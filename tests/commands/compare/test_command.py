"""`dpp compare` end to end: real runs in fresh processes, and a report that a browser opens without a network."""

import json
import shutil
import subprocess

import pytest

from decoupled_pp.settings.load import load_settings
from kit import dpp

CONFIG = """
name: tiny
data: {kind: digits, batch_size: 64}
model: {kind: mlp, width: 16, depth: 3}
stages: 2
training: {steps: 24}
threads: 1
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def compare(*arguments):
    return dpp("compare", "tiny.yaml", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison in which one contender cannot run: 1f1b refuses fewer micro-batches than ranks."""
    root = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "tiny.yaml").write_text(CONFIG)
        arguments = ["--strategies=decoupled,gpipe,1f1b,backprop", "--micro-batches=1", "--repeats=1"]
        arguments += ["--set-for", "decoupled", "optimizer.lr=0.004"]
        assert compare(*arguments, "--output=out") == 0
    return root / "out"


@pytest.mark.slow
def test_the_report_holds_all_that_ran_and_says_what_did_not(folder):
    found = json.loads((folder / "compare.json").read_text())
    assert set(found["strategies"]) == {"decoupled", "gpipe", "backprop"}
    assert "1f1b cannot run with 1 micro-batches per step" in found["not_measured"]["1f1b"]
    for one in found["runs"]:
        assert one["summary"]["steps"] == 24 and len(one["validations"]) == 12
        assert one["figures"]["samples_per_second"] > 0
    assert {row["backward"] for row in found["strategies"]["decoupled"]["traffic"]} == {0}
    assert all(row["backward"] > 0 for row in found["strategies"]["gpipe"]["traffic"])
    rates = {name: load_settings(folder / f"{name}-0" / "config.yaml").optimizer.lr for name in found["strategies"]}
    assert rates["decoupled"] == 0.004 != rates["gpipe"] == rates["backprop"]
    text = (folder / "compare.md").read_text()
    assert (
        "`decoupled` alone was given optimizer.lr=0.004." in text
        and "Not measured: 1f1b: " in text
        and "| gpipe |" in text
    )


@pytest.mark.slow
def test_pipelined_backprop_learns_what_plain_backprop_learns(folder):
    found = json.loads((folder / "compare.json").read_text())
    losses = {one["name"]: [record["loss"] for record in one["validations"]] for one in found["runs"]}
    assert losses["gpipe"] == pytest.approx(losses["backprop"], rel=1e-4)
    assert losses["decoupled"] != pytest.approx(losses["backprop"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_the_report_opens_in_a_browser_without_a_network(folder, tmp_path):
    page, net = folder / "report.html", tmp_path / "net.json"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *quiet,
    ]
    command += [f"--log-net-log={net}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in seen.stderr
    assert seen.stdout.count("</svg>") == 4 and seen.stdout.count("<h2>") == 6
    assert "1f1b was not measured:" in seen.stdout
    page_requests = [line for line in net.read_text().split('"') if line.startswith(("http:", "https:"))]
    ours = [url for url in page_requests if "google" not in url and "gvt1" not in url]  # the browser's own
    assert not ours
    for attribute in ('src="http', "src='http", 'href="http', "url(http", "@import"):
        assert attribute not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--strategies=1f2b"], "'1f2b'"),
        (["--repeats=0"], "--repeats 0"),
        (["--set=naem=x"], "naem"),
        (["--micro-batches=2", "--set-for", "backprop", "optimizer.rl=1"], "optimizer.rl"),
        (["--micro-batches=2", "--set=data={kind: idx, folder: nowhere}"], "nowhere"),
        (["--micro-batches=2", "--strategies=gpipe", "--set=data={kind: idx, folder: nowhere}"], "nowhere"),
        (["--micro-batches=2", "--set-for", "decoupled", "critic.kind=conv"], "conv"),
    ],
)
def test_bad_input(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    assert compare(*arguments) == 2
    assert part in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_an_existing_folder_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert compare("--output=out", "--micro-batches=2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
