"""The examples parse, and what they import from this package exists; the long ones are not run."""

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))

every_example = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)


@every_example
def test_imports_from_this_package_exist(file):
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    wanted = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    missing = []
    for node in wanted:
        if node.module.split(".")[0] == "decoupled_pp":
            module = importlib.import_module(node.module)
            missing += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
    assert not missing


@every_example
def test_public_names_exist(file):
    import decoupled_pp

    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    assert not [node.attr for node in used if node.value.id == "dpp" and node.attr not in decoupled_pp.__all__]


@every_example
def test_the_file_says_how_to_run_it(file):
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{file.name}" in text
