"""The layers of a traced model: each runs one part of the trace with the model's own modules and tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload
from decoupled_pp.core.torch_private import non_persistent_buffers, own_buffers, own_parameters, pytree
from decoupled_pp.models.splitting.kept import Call


@dataclass(frozen=True)
class Code:
    """What one part computes in one mode.

    Attributes:
        run: The code: (part, calls, device, its arguments) -> tensors.
        calls: The calls of kept modules in it.
        takes: Places in the payload that are its arguments.
        gives: For every tensor of the outgoing payload whether the part has made it, and its place.
    """

    run: Callable[..., tuple[Tensor, ...]]
    calls: Sequence[Call]
    takes: tuple[int, ...]
    gives: tuple[tuple[bool, int], ...]


class Part(nn.Module):
    """Holds modules and tensors of the model under their names in it."""

    def hold_module(self, name: str, module: nn.Module) -> None:
        """Hold a module of the model."""
        holder, key = self._place(name)
        if not hasattr(holder, key):
            holder.add_module(key, module)

    def hold_tensor(self, name: str, model: nn.Module, constants: Mapping[str, Tensor]) -> None:
        """Hold a parameter or buffer of the model, or a constant of its trace."""
        holder, key = self._place(name)
        if hasattr(holder, key):
            return  # in a module that is here
        if name in constants:
            # The model's state has no such tensor, and another part may change its own.
            holder.register_buffer(key, constants[name].detach().clone(), persistent=False)
            return
        owner = model.get_submodule(name.rpartition(".")[0])
        if key in own_parameters(owner):
            holder.register_parameter(key, own_parameters(owner)[key])
        else:
            holder.register_buffer(key, own_buffers(owner)[key], persistent=key not in non_persistent_buffers(owner))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        holder: nn.Module = self
        for step in filter(None, path.split(".")):
            if not hasattr(holder, step):
                holder.add_module(step, nn.Module())
            holder = getattr(holder, step)
        return holder, key


class TracedLayer(nn.Module):
    """Runs one part: picks its arguments from the payload, and passes on what later parts need.

    A model that asks for its mode has other code in training than in evaluation.

    Attributes:
        part: Holds its modules and tensors.
        sizes: Sizes of the inputs that the trace holds for; of the first part only.
    """

    def __init__(self, part: Part, codes: Mapping[bool, Code]) -> None:
        """Take what holds the part's modules and tensors, and its code by the training mode."""
        super().__init__()
        self.part = part
        self.sizes: Sequence[InputSizes] = ()
        self._codes = dict(codes)

    def forward(self, payload: Payload) -> Payload:
        """Payload -> payload, or the output."""
        given = [leaf for leaf in pytree.tree_leaves(payload) if isinstance(leaf, Tensor)]
        for tensor, sizes in zip(given, self.sizes, strict=False):
            sizes.check(tensor)
        code = self._codes[self.training]
        made = code.run(self.part, code.calls, given[0].device, *(given[place] for place in code.takes))
        outgoing = tuple(made[place] if own else given[place] for own, place in code.gives)
        return outgoing[0] if len(outgoing) == 1 else outgoing


@dataclass(frozen=True)
class InputSizes:
    """Sizes of an input for which a trace holds.

    Attributes:
        name: How the user knows the input.
        ranges: Smallest and largest size of every dimension.
    """

    name: str
    ranges: tuple[tuple[float, float], ...]

    def check(self, tensor: Tensor) -> None:
        """Check an input.

        Raises:
            UsageError: The trace does not hold for it.
        """
        if len(self.ranges) != tensor.dim():
            raise self._refusal(f"has {tensor.dim()} dimensions", f"{len(self.ranges)}")
        for place, (size, (least, most)) in enumerate(zip(tensor.shape, self.ranges, strict=True)):
            if not least <= size <= most:
                span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
                raise self._refusal(f"has size {size} in dimension {place}", span)

    def _refusal(self, has: str, span: str) -> UsageError:
        return UsageError(
            f"{self.name} {has}, and the model was traced for {span}: the code around its cuts fixes this size; give "
            "all micro-batches that size, or split the model with a sample that has it",
            code="size-unlike-trace",
        )


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """Return the code of a graph as a function whose first argument holds the modules and tensors."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<part of a traced model>", "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made
