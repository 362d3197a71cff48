"""Declares the settings of a run, except for the sections that have a `kind`, and checks them together."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.settings.critics import AutoCritic, CriticSettings
from decoupled_pp.settings.losses import CrossEntropyLoss, LossSettings
from decoupled_pp.settings.rules import CorrectionSettings, CriticTargetSettings, LabelTarget, refuse_rules
from decoupled_pp.settings.sections import (
    Count,
    DataSettings,
    Few,
    HuggingFaceModel,
    ModelSettings,
    PathText,
    Scale,
    Section,
    Weight,
)


class ParameterGroup(Section):
    """Parameters with arguments of their own; keys beside these are arguments of the optimizer's class."""

    model_config = ConfigDict(extra="allow")

    match: str | list[str]
    """Names in the network, `*` for anything, e.g. `*.bias` or `[layer1.*, layer2.*]`; a critic's begin with
    `critic.`. A parameter belongs to the first group that names it."""
    lr: float | None = Field(None, gt=0, le=1e6)
    """Learning rate; default: that of `optimizer`."""

    @property
    def patterns(self) -> list[str]:
        """The names, as a list."""
        return [self.match] if isinstance(self.match, str) else self.match

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the optimizer's class for these parameters."""
        rate = {} if self.lr is None else {"lr": self.lr}
        return rate | (self.model_extra or {})


class OptimizerSettings(Section):
    """The optimizer of every stage: a class of `torch.optim` by name, or a factory."""

    kind: str = "AdamW"
    """Class name in `torch.optim` (AdamW, SGD, Adam, Muon, ...), or `package.module:function` taking the parameters
    (or, with `groups` or `no_decay`, torch's list of groups). Its fused form is used where torch has one."""
    lr: float = Field(1e-3, gt=0, le=1e6)
    """Learning rate."""
    lr_per_stage: list[Weight] | None = None
    """Factors of `lr`, one for every stage (decoupled only); 0: it and its critic stay as they are. Default: 1."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the class, e.g. `{weight_decay: 0.1, betas: [0.9, 0.95]}`; `lr` has its own key.
    `fused: false` takes torch's plain form."""
    groups: list[ParameterGroup] = Field(default_factory=list)
    """Parameters with other arguments, e.g. `[{match: "*.bias", weight_decay: 0}, {match: embedding.*, lr: 1e-4}]`."""
    no_decay: bool = False
    """No weight decay for biases, norms (all parameters of one dimension or none) and embeddings."""

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerSettings:
        if "lr" in self.arguments:
            second = f"`optimizer.arguments.lr` {self.arguments['lr']}"
            raise ValueError(f"{second} would override `optimizer.lr` {self.lr}; give the latter alone")
        if any(factor < 0 for factor in self.lr_per_stage or ()):
            raise ValueError(f"`optimizer.lr_per_stage` {self.lr_per_stage} is negative; give 0 to freeze a stage")
        return self

    def freezes(self, index: int) -> bool:
        """Return whether a stage and its critic stay as they are."""
        return self.lr_per_stage is not None and self.lr_per_stage[index] == 0

    def of_stage(self, index: int) -> OptimizerSettings:
        """Return these settings with the rate of one stage; a frozen stage keeps the common one."""
        if self.lr_per_stage is None or self.freezes(index):
            return self
        factor = self.lr_per_stage[index]
        groups = [g if g.lr is None else g.model_copy(update={"lr": g.lr * factor}) for g in self.groups]
        return self.model_copy(update={"lr": self.lr * factor, "lr_per_stage": None, "groups": groups})


class BalanceSettings(Section):
    """Bounds that a cut by time or by parameters has to respect (decoupled only)."""

    speeds: list[Scale] | None = None
    """Speeds of the stages' devices, relative to each other, e.g. `[1, 1, 0.5, 1]`; default: all alike. Refused
    where the cut does not look at them: `cut` uniform, or the layers listed."""
    memory: str | list[str] | None = None
    """Memory of the devices: one size, such as `20GiB`, or one for each stage; none may need more. Default: any."""


class ScheduleSettings(Section):
    """Learning rate over the optimizer steps of a stage."""

    kind: Literal["constant", "cosine", "linear", "steps", "plateau"] = "constant"
    """After the warm-up: constant; cosine or linear decay to `final`; x `factor` at every milestone (steps), or when
    the held-out loss of the stage's own exit has not fallen for more than `patience` evaluations (plateau)."""
    warmup: int = Field(0, ge=0, le=10**9)
    """Steps of linear warm-up from 0."""
    final: float = Field(0.0, ge=0, le=1)
    """Fraction of the learning rate at the last step (cosine, linear), or at which it stays (plateau)."""
    milestones: list[Count] = Field(default_factory=list)
    """Steps at which the rate is multiplied by `factor` (steps)."""
    factor: Scale = 0.1
    """Multiplier at each milestone (steps) or plateau."""
    patience: int = Field(10, ge=0, le=10**9)
    """Evaluations (`validation.every`) without a lower loss that are waited for (plateau)."""

    @model_validator(mode="after")
    def _used(self) -> ScheduleSettings:
        if self.kind == "steps" and not self.milestones:
            raise ValueError("`schedule.kind` steps needs `schedule.milestones`; give a list of steps")
        users = {
            "factor": ["steps", "plateau"],
            "milestones": ["steps"],
            "final": ["cosine", "linear", "plateau"],
            "patience": ["plateau"],
        }
        for key, kinds in users.items():
            changed = getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)
            if changed and self.kind not in kinds:
                remedy = f"leave it out, or use kind {' or '.join(kinds)}"
                raise ValueError(f"`schedule.{key}` has no effect with `schedule.kind` {self.kind}; {remedy}")
        return self


class StageSettings(Section):
    """How every stage trains, for however long."""

    accumulate: Count = 1
    """Packets (micro-batches) whose gradients are averaged in one optimizer step."""
    # Infinity clips nothing.
    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=True)
    """Largest gradient norm of a stage (its critic included); default: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast (parameters and optimizer stay fp32)."""
    checkpoint_activations: bool = False
    """Recompute activations in backward instead of keeping them (each layer separately)."""
    compile: bool = False
    """`torch.compile` the stage and its critic."""
    stagger: int = Field(0, ge=0, le=10**9)
    """Optimizer steps by which each stage starts to learn after the one before it; till then it passes packets on."""
    critic_warmup: int = Field(0, ge=0, le=10**9)
    """Optimizer steps at the start in which stages with a critic train that alone: for networks that are trained
    already (`start_from`), whose early layers a fresh critic would spoil."""


class TrainingSettings(StageSettings):
    """How every stage trains, and for how long."""

    steps: Count
    """Optimizer steps per stage; each takes `accumulate` packets."""


class LinkSettings(Section):
    """The one-way links between stages."""

    capacity: int = Field(4, ge=1, le=1000)
    """Packets a link may hold, so how far a stage may run ahead of the next; a full link makes its sender wait."""
    timeout_seconds: float = Field(300.0, ge=1e-3, le=1e6)
    """Longest wait for a packet (stage k's first: k times this), for room, or for the other ranks at start and end."""


class ValidationSettings(Section):
    """Held-out evaluation of every exit, flowing forward between training packets."""

    every: Count | None = Field(None, json_schema_extra={"in_scripts": "validate_every"})
    """Optimizer steps between validations; default: only at the end."""
    loss: LossSettings | None = Field(None, json_schema_extra={"in_scripts": "validate_loss"})
    """Loss of the held-out scores alone, chosen like `loss`; default: that one."""
    batches: Count | None = Field(None, json_schema_extra={"in_scripts": "validation_batches"})
    """Validation micro-batches per pass; default: all."""
    knn: Count | None = None
    """Also score every stage's output by a vote of this many nearest training samples; default: do not."""
    knn_samples: Count = 2000
    """The last training samples that a stage keeps for it."""


class CheckpointSettings(Section):
    """Saving the run."""

    every: Count | None = Field(None, json_schema_extra={"in_scripts": "save_every"})
    """Optimizer steps between checkpoints; default: only at the end (and on Ctrl-C)."""
    keep: Count = Field(2, json_schema_extra={"in_scripts": "keep_checkpoints"})
    """Checkpoints to keep."""
    refresh_tied: bool = False
    """At every checkpoint the first user of a weight that was tied (the token embedding) takes what the last one (the
    output projection) had at the checkpoint before; default: they stay two."""


class MetricsSettings(Section):
    """When metrics are flushed."""

    every: Count = Field(50, json_schema_extra={"in_scripts": "log_every"})
    """Packets between two flushes of the metrics of a stage (non-finite losses are found then too)."""


class LoggingSettings(MetricsSettings):
    """Metrics that are written and shown while training."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    trace_packets: Count = 100
    """Training packets per stage in `trace.json`, from the middle of the run."""


class SampleSettings(Section):
    """Text generated from the exported model at the end (token models)."""

    prompt: str = "def "
    """Text to continue."""
    tokens: Count = 200
    """Tokens to generate."""
    temperature: Weight = 0.8
    """Softmax temperature; 0 takes the likeliest token."""


Strategy = Literal[
    "decoupled",
    "backprop",
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "zero_bubble",
    "zbv",
    "deepspeed",
    "data_parallel",
]


STAGES_ALONE: dict[str, Any] = {
    "optimizer.lr_per_stage": None,
    "training.stagger": 0,
    "training.critic_warmup": 0,
    "balance.speeds": None,
    "balance.memory": None,
    "checkpoint.refresh_tied": False,
    "validation.knn": None,
    "global_correction": None,
}
"""Settings that only decoupled stages can have -> the value that leaves each one out."""


def refuse_rates(optimizer: OptimizerSettings, stages: int) -> None:
    """Raise UsageError unless each stage has one factor of the learning rate, or none has."""
    factors = optimizer.lr_per_stage
    if factors is not None and len(factors) != stages:
        raise UsageError(
            f"`optimizer.lr_per_stage` has {len(factors)} factors for {stages} stages; give one for each",
            code="one-rate-per-stage",
            key="optimizer.lr_per_stage",
        )


def refuse_speeds(speeds: Sequence[float] | None, stages: int, cut: object) -> None:
    """Raise UsageError unless each stage has one speed, or none has, and the cut looks at them."""
    if speeds is None:
        return
    fault = None
    if len(speeds) != stages:
        fault = f"has {len(speeds)} numbers for {stages} stages; give one for each"
    elif cut not in ("time", "parameters") and stages > 1:
        fault = f"has no effect with `cut` {cut}; leave it out, or cut by time or parameters"
    if fault is not None:
        raise UsageError(f"`balance.speeds` {fault}", code="bad-speeds", key="balance.speeds")


class Settings(Section):
    """A run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    """Name of the run; its folder is `<runs>/<name>`."""
    runs: PathText = "runs"
    """Folder of all runs."""
    seed: int = Field(0, ge=0, le=10**18)
    """Seed of everything: weights, critics, data order, augmentation, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU per rank and NCCL where there are GPUs, else the CPU and gloo."""
    threads: Few | None = None
    """CPU threads per rank inside torch operators; default: `OMP_NUM_THREADS` if you have set it, else the cores that
    are free when the run starts, divided by the ranks that share them. `--resume` keeps the number."""
    strategy: Strategy = "decoupled"
    """How to train: decoupled, or by backpropagation as a baseline (pipelines with `training.accumulate` micro-batches
    per flush: torch's gpipe, 1f1b, interleaved_1f1b, zero_bubble and zbv, DeepSpeed's; data_parallel; or all in one
    process: backprop)."""
    stages: Few = 2
    """Stages the network is cut into; one per rank (decoupled: or all in one process)."""
    cut: Literal["time", "parameters", "uniform"] | list[int] = "time"
    """Balance stages by measured time, by parameters, by number of layers, or give the layers per stage."""
    balance: BalanceSettings = BalanceSettings()
    """Uneven devices, and how much memory they have."""
    model: ModelSettings
    """The network."""
    start_from: PathText | None = None
    """Folder of a finished run, or a safetensors file, whose weights the network starts with; default: fresh ones."""
    data: DataSettings
    """The data set."""
    loss: LossSettings = CrossEntropyLoss()
    """The loss: a section, the name of its kind, or `package.module:function` called as `function(output, target)`."""
    critic: CriticSettings = AutoCritic()
    """The critic of every stage before the last."""
    critic_target: CriticTargetSettings = LabelTarget()
    """Source that stages and critics learn from: labels, the next stage's losses, or true gradients that come late."""
    critic_overlap: int = Field(0, ge=0, le=10_000)
    """First layers of the next stage that every stage trains copies of, below its critic; no byte more is sent."""
    global_correction: CorrectionSettings | None = None
    """End-to-end steps between local ones; default: none."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer of every stage."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning-rate schedule of every stage."""
    training: TrainingSettings
    """How every stage trains, and for how long."""
    links: LinkSettings = LinkSettings()
    """The links between stages."""
    validation: ValidationSettings = ValidationSettings()
    """Held-out evaluation."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Saving the run."""
    logging: LoggingSettings = LoggingSettings()
    """Metrics."""
    sample: SampleSettings | None = None
    """Generate text at the end; default: do not."""

    @model_validator(mode="after")
    def _together(self) -> Settings:
        refuse_rules(
            self.critic_target,
            self.global_correction,
            capacity=self.links.capacity,
            stagger=self.training.stagger,
            critic_warmup=self.training.critic_warmup,
            plateau=self.schedule.kind == "plateau",
        )
        refuse_rates(self.optimizer, self.stages)
        if self.checkpoint.refresh_tied and self.checkpoint.every is None:
            raise UsageError(
                "`checkpoint.refresh_tied` takes weights from checkpoints: set `checkpoint.every`",
                code="refresh-needs-checkpoints",
                key="checkpoint.every",
            )
        if isinstance(self.cut, list) and (len(self.cut) != self.stages or min(self.cut, default=0) < 1):
            wanted = f"{self.stages} entries (`stages`), each at least 1"
            raise ValueError(f"`cut` {self.cut} must have {wanted}; list the layers per stage")
        if isinstance(self.model, HuggingFaceModel) and self.model.meta:
            self._refuse_whole_network()
        steps = f"`training.steps` {self.training.steps}"
        last = self.training.stagger * (self.stages - 1)  # the last stage begins so late
        before = {"schedule.warmup": self.schedule.warmup, "training.critic_warmup": self.training.critic_warmup}
        for key, count in {**before, "training.stagger": last}.items():
            if count >= self.training.steps:
                raise ValueError(f"`{key}` {attrgetter(key)(self)} leaves none of {steps}; lower it")
        if max(self.schedule.milestones, default=0) >= self.training.steps:
            raise ValueError(
                f"`schedule.milestones` {shown(self.schedule.milestones)} go beyond {steps}; leave those out"
            )
        if (self.validation.every or 0) > self.training.steps:
            remedy = "lower it, or leave it out (null) to validate only at the end"
            raise ValueError(f"`validation.every` {self.validation.every} is more than {steps}; {remedy}")
        if self.schedule.kind == "plateau" and self.validation.every is None:
            raise ValueError("`schedule.kind` plateau follows held-out losses; set `validation.every`")
        return self

    def _refuse_whole_network(self) -> None:
        needs_it = {"strategy": self.strategy != "decoupled", "sample": self.sample, "start_from": self.start_from}
        for key, value in needs_it.items():
            if value:
                raise ValueError(f"`{key}` needs the whole network in one process; leave it or `model.meta` out")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name
