"""Private names of torch: each is still there, does what it is used for, and is used in one file only."""

import ast
import logging
import pkgutil
from collections import namedtuple
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


def check_has_hooks():
    for kind in ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = network()
        assert not torch_private.has_hooks(module)
        getattr(module, f"register_{kind}")(lambda *given: None)
        assert torch_private.has_hooks(module)


def check_forward_hooks():
    module = network()
    handle = module.register_forward_hook(lambda *_: pytest.fail("the hook is out"))
    assert list(torch_private.forward_hooks(module)) == [handle.id]
    del torch_private.forward_hooks(module)[handle.id]
    module(torch.zeros(4, 2))
    handle.remove()


def check_forward_pre_hooks():
    module = network()
    module.register_forward_pre_hook(print)
    assert torch_private.forward_pre_hooks(module) == [print]


def check_compiled_module():
    module = network()
    assert torch_private.compiled_module(module) is None
    assert torch_private.compiled_module(torch.compile(module, backend="eager")) is module


def check_compile_in_place():
    calls = []
    module = nn.Linear(2, 3)
    wrapper = torch.compile(module, backend=lambda graph, inputs: calls.append(1) or graph.forward)
    assert torch_private.compile_in_place(wrapper) is module
    module(torch.ones(1, 2))
    assert calls


def check_uncompiled():
    seen = []
    look = torch_private.uncompiled(lambda value: seen.append(torch.compiler.is_compiling()))
    torch.compile(lambda value: look(value), backend="eager")(torch.ones(1))  # noqa: PLW0108 - the compiled caller
    assert seen == [False]


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


def traced_sizes():
    """Rows of a trace, twice the rows, and the trace's constraints."""

    class Twice(nn.Module):
        def forward(self, x):
            return torch.cat([x, x])

    program = torch.export.export(Twice(), (torch.ones(4, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    rows, twice = (node.meta["val"].shape[0] for node in program.graph.nodes if node.op != "output")
    return rows, twice, program.range_constraints


def check_operator_name():
    assert torch_private.operator_name(torch.ops.aten.relu.default) == "aten::relu"


def check_writes_in_place():
    assert torch_private.writes_in_place(torch.ops.aten.relu_.default)
    assert not torch_private.writes_in_place(torch.ops.aten.relu.default)


def check_nested_from_lengths():
    nested = torch_private.nested_from_lengths(torch.ones(2, 3, 4), torch.tensor([3, 1]))
    assert [row.shape[0] for row in nested.unbind()] == [3, 1]


def check_slow_attention():
    before = torch.backends.mha.get_fastpath_enabled()
    with torch_private.slow_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


def check_size_symbols():
    rows, twice, _ = traced_sizes()
    assert torch_private.size_symbols(rows) == torch_private.size_symbols(twice) != set()
    assert torch_private.size_symbols(3) == set()


def check_size_value():
    rows, twice, _ = traced_sizes()
    (symbol,) = torch_private.size_symbols(rows)
    assert [torch_private.size_value(size, {symbol: 5}) for size in (rows, twice, 3)] == [5, 10, 3]


def check_is_same_size():
    rows, twice, _ = traced_sizes()
    assert torch_private.is_same_size(rows, rows) and torch_private.is_same_size(3, 3)
    assert not torch_private.is_same_size(rows, twice) and not torch_private.is_same_size(rows, 4)


def check_size_range():
    rows, _, constraints = traced_sizes()
    assert torch_private.size_range(rows, constraints) == (0, float("inf"))
    assert torch_private.size_range(3, constraints) == (3, 3)


def check_tensors_without_data():
    with torch_private.tensors_without_data():
        made = nn.Linear(3, 2)(torch.empty(5, 3))
    assert made.shape == (5, 2) and made.device.type == "cpu"


def check_is_without_data():
    with torch_private.tensors_without_data():
        made = torch.empty(2)
    assert torch_private.is_without_data(made) and not torch_private.is_without_data(torch.empty(2))


def check_causal_masks_asked_by():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1)
    asked = []
    with torch_private.causal_masks_asked_by(lambda *_: asked.append(True) or True):
        encoder(torch.ones(1, 3, 4), nn.Transformer.generate_square_subsequent_mask(3))
    assert asked == [True]


def check_quiet_tracing():
    log = logging.getLogger("torch.export")
    before = log.level
    with torch_private.quiet_tracing():
        assert log.level == logging.CRITICAL
    assert log.level == before


def check_is_container():
    named = namedtuple("named", "a")(1)
    assert all(map(torch_private.is_container, ((1,), [1], {}, named, type(named))))
    assert not any(map(torch_private.is_container, (1, "text", torch.ones(1))))


def check_split_container():
    assert torch_private.split_container({"a": 1, "b": 2}) == ([1, 2], ["a", "b"])
    assert torch_private.split_container(namedtuple("named", "a")(1)) == ([1], None)


def check_of_items():
    assert torch_private.of_items(dict, [1, 2], ["a", "b"]) == {"a": 1, "b": 2}
    named = namedtuple("named", "a")
    assert torch_private.of_items(named, [1], None) == named(1)


def check_shallow_copy():
    made = network()
    copied = torch_private.shallow_copy(made)
    torch_private.own_parameters(copied)["weight"] = None
    torch_private.child_modules(copied).pop("child")
    assert made.weight is not None and made.child is not None and copied.bias is made.bias


def check_version_of():
    changed = torch.ones(2)
    before = torch_private.version_of(changed)
    changed.view(1, 2).add_(1)
    assert torch_private.version_of(changed) > before


def check_coo_parts():
    doubled = torch.eye(2).to_sparse() + torch.eye(2).to_sparse()
    indices, values = torch_private.coo_parts(doubled)
    assert indices.shape[1] == len(values)


def check_saved_tensors_hooks():
    """They see what a plain layer saves, and are gone while torch.func differentiates."""
    saved = []
    plain = torch.ones(2, requires_grad=True)
    with torch_private.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        slope = torch.func.grad(lambda x: x.square().sum())(plain)
        counted = len(saved)
        plain.square()
    assert torch.equal(slope, 2 * torch.ones(2)) and len(saved) == counted + 1
    plain.square()
    assert len(saved) == counted + 1


def check_hooks_aside():
    """Hooks of others, several deep, are gone while torch.func differentiates, and then as they were."""
    saved = []
    hooks = [torch.autograd.graph.saved_tensors_hooks(lambda t, n=n: saved.append(n) or t, lambda t: t) for n in (0, 1)]
    plain = torch.ones(2, requires_grad=True)
    with torch_private.hooks_aside(), hooks[0], hooks[1]:
        slope = torch.func.grad(lambda x: torch.func.vmap(torch.func.grad(torch.sin))(x).sum())(plain)
        assert not saved
        plain.exp()
    assert saved == [1]
    assert torch.allclose(slope, -torch.sin(plain))


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
