"""Implements the baseline `deepspeed`: DeepSpeed's own PipelineModule and PipelineEngine (1F1B) as a strategy."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Payload, as_tuple, map_payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.pipeline.optim import build_optimizers
from decoupled_pp.training.baselines.strategy import Part, Strategy, Training


class DeepSpeedPipeline(Strategy):
    """One stage per rank, trained by `PipelineEngine.train_batch` and stepped by the engine's own optimizer step.

    DeepSpeed's own code runs: its 1F1B `TrainSchedule`, its blocking sends, its reduction over (here single) replicas,
    its clipping over the whole network, then our torch optimizer and learning-rate schedule, both handed to
    `deepspeed.initialize`. One thing is moved: the instruction `OptimizerStep`, last in the schedule, is held
    back until `train_batch` has returned, so that `gradients` leaves the gradients in `.grad`; `_update` then executes
    it. Autocast to bf16 is ours (`Part`), so that parameters and optimizer state stay fp32 as in the other baselines.

    Faults of DeepSpeed 0.19.8 that would end a run or falsify it are mended from outside, each where a comment says so.
    """

    def __init__(self, plan: Plan, training: Training, device: torch.device, *, rank: int, ranks: int) -> None:
        """Take over this rank's stage; every rank must have joined the default process group."""
        _check(plan, training)
        super().__init__(plan, [rank], training, device)
        for parameter in self.parts[rank].parameters():
            # Else the norm to clip by in fp32 leaves out every stage but the first, as if they were copies of it.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        self._rank = rank
        self._last = rank == ranks - 1
        self._forwards = 0
        self._backwards = 0
        self._losses: list[Tensor] = []  # of the step's micro-batches, on the last rank
        self._shapes: object = None
        self._engine = self._build(ranks)

    @staticmethod
    def alone(plan: Plan, training: Training, device: torch.device) -> DeepSpeedPipeline:
        """Build a pipeline of one rank: the engine's own Python, without a message. All ranks call this together.

        Ranks of pipelines one stage deep are replicas to DeepSpeed; here they exchange nothing.
        """
        pipeline = DeepSpeedPipeline(plan, training, device, rank=0, ranks=1)
        pipeline._engine.is_data_parallel = False
        pipeline._engine.pipeline_enable_backward_allreduce = False
        return pipeline

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See `Strategy`; rank 0 uses the inputs, the last rank the targets and returns the losses."""
        engine = self._engine
        self.weigh(batches)
        if engine.micro_batches != len(batches):
            engine.set_train_batch_size(len(batches) * engine.dp_world_size)
        shapes = [[tuple(tensor.shape) for tensor in as_tuple(inputs)] for inputs, _ in batches]
        engine.dynamic_shape = any(shape != shapes[0] for shape in shapes)  # then shapes travel with every tensor
        if engine.dynamic_shape or shapes[0] != self._shapes:
            engine.reset_activation_shape()
        self._shapes = None if engine.dynamic_shape else shapes[0]
        self._forwards = 0
        self._backwards = 0
        self._losses.clear()
        engine.train_batch(iter(batches))
        return list(self._losses)

    def owner(self, stage: int) -> int | None:
        """See `Strategy`."""
        return stage

    def _update(self) -> None:
        """Take the engine's own step: clip, optimizer, zero the gradients, learning rate."""
        self._engine._exec_optimizer_step()

    def _skip(self) -> None:
        """Let the engine do all of its step but the optimizer's."""
        super()._skip()
        self._engine.global_steps += 1

    def _build(self, ranks: int) -> Any:
        """Build the engine of this rank's stage, with instructions that record what they do."""
        deepspeed = import_deepspeed(self.device)
        # Stages of other ranks: DeepSpeed counts them and never calls them.
        layers = [_Layer(self.parts[k]) if k in self.parts else nn.Identity() for k in range(ranks)]
        config = {
            "train_micro_batch_size_per_gpu": 1,  # a micro-batch is whatever the iterator yields
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.training.options.clip_norm or 0.0,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},
        }
        _use_process_group(deepspeed, self.device)
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints its seeds, which it does not use
            module = deepspeed.pipe.PipelineModule(
                layers, num_stages=ranks, loss_fn=self._judge, partition_method="uniform"
            )
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizers[0],
                lr_scheduler=self._schedules[0] if self._schedules else None,
                config=config,
            )
        engine._allocate_or_extend_buffers = self._buffer
        engine._INSTRUCTION_MAP = self._recorded(engine._INSTRUCTION_MAP)
        return engine

    def _recorded(self, instructions: dict[Any, Any]) -> dict[Any, Any]:
        """Return the engine's instructions; some of them tell the recorder, or count what they send."""
        shadows: dict[str, Callable[..., None]] = {
            "ForwardPass": self._forward,
            "BackwardPass": self._backward,
            "SendActivation": self._send_activation,
            "SendGrad": self._send_gradient,
        }
        recorded = dict(instructions)
        for kind, execute in instructions.items():
            if kind.__name__ == "OptimizerStep":
                recorded[kind] = lambda engine: None  # `_update` takes the step
            elif kind.__name__ in shadows:
                recorded[kind] = _shadow(shadows[kind.__name__], execute)
        return recorded

    def _forward(self, execute: Callable[[], None], engine: Any, buffer: int) -> None:
        self._begin(self._forwards)
        self._forwards += 1
        execute()
        if not self._last:  # in the last stage `_judge` has recorded it
            self.recorder.lap("forward")

    def _judge(self, output: Payload, target: Payload) -> Tensor:
        """Return a micro-batch's share of the loss; the engine asks for it at the end of the last stage's forward."""
        self.recorder.lap("forward")
        loss, share = self.judged_part(output, target, len(self._losses))
        self._losses.append(loss.detach())
        self.recorder.lap("critic")
        return share

    def _backward(self, execute: Callable[[], None], engine: Any, buffer: int) -> None:
        self._begin(self._backwards)
        self._backwards += 1
        execute()
        self.recorder.lap("backward")

    def _begin(self, number: int) -> None:
        self.recorder.begin(self.first + number)
        self.recorder.lap("wait_in")

    def _send_activation(self, execute: Callable[[], None], engine: Any, buffer: int) -> None:
        tensors = as_tuple(engine.pipe_buffers["outputs"][buffer])
        self._sent(self._rank, self._rank + 1, sum(tensor.nbytes for tensor in tensors))
        execute()

    def _send_gradient(self, execute: Callable[[], None], engine: Any, buffer: int) -> None:
        tensors = [tensor for tensor in as_tuple(engine.pipe_buffers["inputs"][buffer]) if tensor.is_floating_point()]
        for tensor in tensors:
            if tensor.grad is None:  # the stage does not use it; the engine asserts a gradient all the same
                tensor.grad = torch.zeros_like(tensor)
        self._sent(self._rank - 1, self._rank, sum(tensor.nbytes for tensor in tensors), backward=True)
        execute()

    def _buffer(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new receive buffer."""
        # The engine's own method reuses earlier ones regardless of dtype: a bf16 gradient may be received as fp32.
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


class _Layer(nn.Module):
    """Makes the output of a part fit to send: contiguous, of known dtypes, and every floating tensor with a graph."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, payload: Payload) -> Payload:
        return map_payload(_sendable, self.part(*as_tuple(payload)))


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device; it leaves no environment variable and writes nothing but errors."""
    try:
        with environment.temporarily({"DS_ACCELERATOR": device.type}):  # read once, at the import
            import deepspeed
            from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise UsageError(
            f"`strategy` deepspeed: the package cannot be imported ({error}); pip install 'decoupled_pp[deepspeed]', "
            "or use another strategy",
            code="package-missing",
            key="strategy",
        ) from error
    kind = get_accelerator().device_name()
    if kind != device.type:
        raise UsageError(
            f"`strategy` deepspeed: the package has been imported for {kind}, not {device.type}; use a new process",
            code="package-imported-for-another-device",
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _check(plan: Plan, training: Training) -> None:
    """Refuse what the engine cannot train, on every rank alike and before anything is sent."""
    dtypes = {parameter.dtype for parameter in plan.module.parameters()}
    unfit = dtypes - {torch.float32, torch.bfloat16, torch.float16}
    if unfit:
        raise UsageError(
            f"`strategy` deepspeed cannot reduce gradients of {unfit.pop()}; use fp32 parameters",
            code="dtype-cannot-be-reduced",
            key="strategy",
        )
    for k in range(plan.stages):
        count = len(build_optimizers(training.optimizer, plan.stage_module(k), None, owns_head=k == plan.stages - 1))
        if count != 1:
            reason = "has nothing to train" if count == 0 else f"has {count} optimizers, as Muon's stages do"
            raise UsageError(
                f"`strategy` deepspeed: stage {k} {reason}; its engine takes one: set `cut` or `optimizer.kind` to "
                "something else",
                code="engine-takes-one-optimizer",
                key="strategy",
            )


def _use_process_group(deepspeed: Any, device: torch.device) -> None:
    """Let DeepSpeed talk over the process group that is there, and never compile anything for it."""
    # On the CPU it would build a shared-memory operator at the first run. That takes ninja, a C++ compiler and half a
    # minute, and the operator serves only the reductions of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend("gloo", None, None)
    if device.type == "cuda":
        pipeline = dist.new_group(backend="nccl")
        backend.new_group = partial(dist.new_group, backend="nccl")
        backend.send = lambda tensor, dst, group=None, tag=0: dist.send(tensor, dst, group=group or pipeline, tag=tag)
        backend.recv = lambda tensor, src, group=None, tag=0: dist.recv(tensor, src, group=group or pipeline, tag=tag)
    deepspeed.comm.comm.cdb = backend


def _shadow(told: Callable[..., None], execute: Callable[..., None]) -> Callable[..., None]:
    """Return an instruction of the engine that `told` carries out by calling its first argument."""
    return lambda engine, buffer_id: told(partial(execute, engine, buffer_id), engine, buffer_id)


def _sendable(tensor: Tensor) -> Tensor:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if tensor.dtype not in PipelineEngine.DTYPE_TO_ID:
        raise UsageError(
            f"`strategy` deepspeed cannot send tensors of {tensor.dtype} between stages; set `cut` to something else",
            code="dtype-cannot-travel",
            key="strategy",
        )
    if tensor.is_floating_point() and not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    return tensor.contiguous()
