"""Private names of torch: each is still there, does what it is used for, and is used in one file only."""

import ast
import pkgutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import decoupled_pp
from decoupled_pp.core import torch_private

SOURCE = Path(decoupled_pp.__file__).parent
OTHER_LIBRARIES = {"training/baselines/deepspeed_pipeline.py", "models/huggingface.py"}
"""Files that use private names of DeepSpeed and of transformers."""
STANDARD = {"_make", "_replace", "_ActionsContainer", "_exit"}
"""Names of the standard library that are public in spite of their underscore, or have no public one."""


def network():
    made = nn.Linear(2, 3)
    made.register_buffer("kept", torch.ones(1))
    made.register_buffer("dropped", torch.ones(1), persistent=False)
    made.register_module("child", nn.Identity())
    made.register_module("nothing", None)
    return made


def gone(name, error):
    pytest.fail(f"torch {torch.__version__} has no {name}: mend core/torch_private.py ({error})", pytrace=False)


def in_a_group_of_one(use):
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return use(store)
    finally:
        dist.destroy_process_group()


def check_child_modules():
    assert list(torch_private.child_modules(network())) == ["child", "nothing"]


def check_own_parameters():
    assert list(torch_private.own_parameters(network())) == ["weight", "bias"]


def check_own_buffers():
    assert list(torch_private.own_buffers(network())) == ["kept", "dropped"]


def check_non_persistent_buffers():
    assert torch_private.non_persistent_buffers(network()) == {"dropped"}


def check_storage_address():
    empty = [torch.empty(0) for _ in range(2)]
    first, second = (torch_private.storage_address(tensor.untyped_storage()) for tensor in empty)
    assert first != second == torch_private.storage_address(empty[1].view(0, 1).untyped_storage())


def check_default_store():
    def use(store):
        torch_private.default_store().set("key", "value")
        return True

    assert in_a_group_of_one(use)


def check_backend_of():
    def use(store):
        return torch_private.backend_of(dist.group.WORLD, torch.device("cpu"))

    backend = in_a_group_of_one(use)
    assert {"send", "recv"} <= set(dir(backend))


def check_compiler_config():
    config = torch_private.compiler_config()
    with config.patch(fail_on_recompile_limit_hit=True):
        assert config.recompile_limit > 0


def check_recompile_limit_hit():
    assert issubclass(torch_private.recompile_limit_hit(), Exception)


def check_pytree():
    pytree = torch_private.pytree
    leaves, spec = pytree.tree_flatten({"a": [1, 2], "b": 3})
    assert leaves == [1, 2, 3] and isinstance(spec, pytree.TreeSpec)
    assert pytree.tree_leaves(pytree.tree_map_only(int, str, pytree.tree_unflatten(leaves, spec))) == ["1", "2", "3"]
    assert callable(pytree.register_dataclass)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_the_name_behind_it_is_there(name):
    try:
        CHECKS[name]()
    except (AttributeError, ImportError, TypeError) as error:
        gone(f"private name behind torch_private.{name}", error)


def test_every_one_has_a_check():
    tree = ast.parse((SOURCE / "core" / "torch_private.py").read_text())
    assert {"pytree", *(node.name for node in tree.body if isinstance(node, ast.FunctionDef))} == set(CHECKS)


@pytest.mark.parametrize("name", [*torch_private.OVERRIDDEN, *torch_private.BY_NAME])
def test_a_name_that_is_overridden_or_looked_up_is_there(name):
    owner, _, last = name.rpartition(".")
    try:
        getattr(pkgutil.resolve_name(owner), last)
    except (AttributeError, ImportError) as error:
        gone(name, error)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_uses_private_names_of_torch(path):
    if path.name == "torch_private.py" or str(path.relative_to(SOURCE)) in OTHER_LIBRARIES:
        return
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    overridden = {name.rpartition(".")[2] for name in torch_private.OVERRIDDEN}
    used = {node.attr for node in attributes} - own - overridden
    used |= {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in _imported(node)}
    assert not {name for name in used - STANDARD if name.startswith("_") and not name.startswith("__")}


def _imported(node):
    return [] if node.module == "__future__" else [*(node.module or "").split("."), *(one.name for one in node.names)]
