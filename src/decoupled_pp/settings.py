"""Every setting of a run: typed, documented field by field, checked together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, yes/no is no number, settings do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(f"{key} takes no yes/no value, not {str(value).lower()}")
        return values


class Factory(Section):
    """Something of your own, made by a function that is named here."""

    kind: Literal["factory"]
    factory: str
    """`package.module:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function."""


# ---------------------------------------------------------------------------------------------------------- model


class GptModel(Section):
    """Byte/BPE GPT: pre-norm decoder with causal attention. Layers: embedding, `depth` blocks, head."""

    kind: Literal["gpt"]
    width: int = Field(128, ge=1)
    """Width of the residual stream; a multiple of `heads`."""
    depth: int = Field(4, ge=1)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads per block."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability after embedding, attention and MLP."""

    @model_validator(mode="after")
    def _width_divides(self) -> GptModel:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ResnetModel(Section):
    """CIFAR ResNet (He et al. 2016, section 4.2): stem, (depth-2)/2 basic blocks in three widths, head."""

    kind: Literal["resnet"]
    depth: Literal[8, 14, 20, 26, 32, 44, 56, 110] = 20
    """Number of weighted layers, 6n+2."""
    width: int = Field(16, ge=1)
    """Channels of the first of the three groups of blocks; each next group has twice as many."""


class VggModel(Section):
    """The VGG-like network of local critic training (Lee & Lee 2019): 11 3x3 convolutions in four widths and a head."""

    kind: Literal["vgg"]
    width: int = Field(64, ge=1)
    """Channels of the first group (paper: 64); each next group has twice as many."""


class MlpModel(Section):
    """Multi-layer perceptron on the flattened input."""

    kind: Literal["mlp"]
    width: int = Field(256, ge=1)
    """Units per hidden layer."""
    depth: int = Field(4, ge=1)
    """Number of hidden layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability after every hidden layer."""


class FactoryModel(Factory):
    """Your own network: `function(info, **arguments)` returns an `nn.Sequential` or a list of layers (`DataInfo`)."""


ModelSettings = Annotated[GptModel | ResnetModel | VggModel | MlpModel | FactoryModel, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------------------------- data


class BatchSettings(Section):
    """What every data set shares."""

    batch_size: int = Field(32, ge=1)
    """Samples per packet (micro-batch)."""
    validation_batch_size: int | None = Field(None, ge=1)
    """Samples per packet in validation; default: `batch_size`."""


class ImageSettings(BatchSettings):
    """What image data sets share."""

    augment: bool = False
    """Standard augmentation of training images: pad by 4 and crop at random, flip left-right at random."""


class TokenSettings(BatchSettings):
    """What token data sets share."""

    context: int = Field(128, ge=1)
    """Tokens per sample."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the files (or, for a single file, of the text) held out for validation."""


class DigitsData(BatchSettings):
    """scikit-learn's digits: 1797 real 8x8 scans, 10 classes (ships with scikit-learn)."""

    kind: Literal["digits"]
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the scans held out for validation."""


class PythonSourceData(TokenSettings):
    """Bytes of the Python standard library on this machine: real text, no download, vocabulary 256."""

    kind: Literal["python_source"]


class TextData(TokenSettings):
    """Any text files, as bytes or through a tokenizer."""

    kind: Literal["text"]
    files: list[str] = Field(min_length=1)
    """Glob patterns of the files, relative to the working directory; `**` is recursive."""
    tokenizer: str | None = None
    """A Hugging Face `tokenizers` file, or a folder with GPT-2's `encoder.json` and `vocab.bpe`; default: bytes."""


class IdxData(ImageSettings):
    """MNIST / Fashion-MNIST: the four IDX files (`train-images-idx3-ubyte` ..., plain or .gz) of one folder."""

    kind: Literal["idx"]
    folder: str
    """Folder of the four files."""


class CifarBinaryData(ImageSettings):
    """CIFAR-10: the official binary records (`data_batch_1.bin` .. `data_batch_5.bin`, `test_batch.bin`)."""

    kind: Literal["cifar_binary"]
    folder: str
    """Folder of the files."""


class HuggingFaceData(TokenSettings):
    """A Hugging Face `datasets` text or image data set (extra `hf`), streamed or loaded."""

    kind: Literal["huggingface"]
    path: str
    """Name on the hub, a local folder, or a builder name such as `json`, `text`, `parquet`, `imagefolder`."""
    config: str | None = None
    """Configuration name of the data set."""
    data_files: dict[str, str | list[str]] | None = None
    """Files per split for a builder name, as in `datasets.load_dataset`."""
    streaming: bool = False
    """Read on the fly instead of loading first; shuffled in a buffer."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; default: hold out `validation_fraction` of the train split (not with streaming)."""
    text_column: str | None = None
    """Column with text: a token data set."""
    tokenizer: str | None = None
    """As in `text`; default: bytes."""
    image_column: str | None = None
    """Column with images: an image data set."""
    label_column: str = "label"
    """Column with integer class labels, for images."""
    shuffle_buffer: int = Field(1000, ge=1)
    """Samples in the shuffle buffer when streaming."""

    @model_validator(mode="after")
    def _one_column(self) -> HuggingFaceData:
        if (self.text_column is None) == (self.image_column is None):
            raise ValueError("give exactly one of text_column and image_column")
        return self


class FactoryData(BatchSettings, Factory):
    """Your own data: `function(settings, seed, **arguments)` returns a `decoupled_pp.Data`; `settings` is this one."""


DataSettings = Annotated[
    DigitsData | PythonSourceData | TextData | IdxData | CifarBinaryData | HuggingFaceData | FactoryData,
    Field(discriminator="kind"),
]


# --------------------------------------------------------------------------------------------------------- critic


class HeadCritic(Section):
    """Pool + linear; for tokens norm + vocabulary projection. The cheapest critic."""

    kind: Literal["head"] = "head"


class MlpSrCritic(Section):
    """Spatially reduced MLP head of decoupled greedy learning (Belilovsky et al. 2020); images and vectors."""

    kind: Literal["mlp_sr"]
    convolutions: int = Field(3, ge=0)
    """1x1 convolutions after the spatial reduction (paper: 3)."""
    linears: int = Field(3, ge=0)
    """Hidden linear layers before the output layer (paper: 3)."""


class AuglocalCritic(Section):
    """A fresh copy of layers sampled uniformly from those above the stage, then the head (AugLocal, Ma et al. 2024)."""

    kind: Literal["auglocal"]
    depth: int = Field(2, ge=1)
    """Sampled layers of the critic of the first stage (d)."""
    pyramid: float = Field(0.5, ge=0, le=1)
    """Share of `depth` taken off linearly towards the last critic (c in the paper)."""


class FactoryCritic(Factory):
    """Your own critic: `function(context, **arguments)` builds an `nn.Module` from stage output to logits."""


CriticSettings = Annotated[HeadCritic | MlpSrCritic | AuglocalCritic | FactoryCritic, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------- training


class OptimizerSettings(Section):
    """The optimizer of every stage: a class of `torch.optim` by name, or a factory."""

    kind: str = "AdamW"
    """Class name in `torch.optim` (AdamW, SGD, Adam, Muon, ...), or `package.module:function` taking the parameters."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the class, e.g. `{weight_decay: 0.1, betas: [0.9, 0.95]}`."""


class ScheduleSettings(Section):
    """Learning rate over the optimizer steps of a stage."""

    kind: Literal["constant", "cosine", "linear", "steps"] = "constant"
    """After the warm-up: constant; cosine or linear decay to `final`; or x `factor` at every milestone."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    final: float = Field(0.0, ge=0, le=1)
    """Fraction of the learning rate at the last step (cosine, linear)."""
    milestones: list[int] = Field(default_factory=list)
    """Steps at which the rate is multiplied by `factor` (steps)."""
    factor: float = Field(0.1, gt=0)
    """Multiplier at each milestone (steps)."""


class TrainingSettings(Section):
    """How every stage trains."""

    steps: int = Field(ge=1)
    """Optimizer steps per stage; each takes `accumulate` packets."""
    accumulate: int = Field(1, ge=1)
    """Packets (micro-batches) whose gradients are averaged in one optimizer step."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest gradient norm of a stage (its critic included); default: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast (parameters and optimizer stay fp32)."""
    checkpoint_activations: bool = False
    """Recompute activations in backward instead of keeping them (each layer separately)."""
    compile: bool = False
    """`torch.compile` the stage and its critic."""


class LinkSettings(Section):
    """The one-way links between stages."""

    capacity: int = Field(4, ge=1)
    """Packets a link may hold, so how far a stage may run ahead of the next; a full link makes its sender wait."""
    timeout_seconds: float = Field(300.0, gt=0)
    """Longest wait for a packet (stage k's first: k times this), for room, or for the other ranks at start and end."""


class ValidationSettings(Section):
    """Held-out evaluation of every exit, flowing forward between training packets."""

    every: int | None = Field(None, ge=1)
    """Optimizer steps between validations; default: only at the end."""
    batches: int | None = Field(None, ge=1)
    """Validation micro-batches per pass; default: all."""


class CheckpointSettings(Section):
    """Saving the run."""

    every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints; default: only at the end (and on Ctrl-C)."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep."""


class LoggingSettings(Section):
    """What is written and shown while training."""

    every: int = Field(50, ge=1)
    """Packets between two flushes of the metrics of a stage (non-finite losses are found then too)."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    trace_packets: int = Field(100, ge=1)
    """Training packets per stage in `trace.json`, from the middle of the run."""


class SampleSettings(Section):
    """Text generated from the exported model at the end (token models)."""

    prompt: str = "def "
    """Text to continue."""
    tokens: int = Field(200, ge=1)
    """Tokens to generate."""
    temperature: float = Field(0.8, ge=0)
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


class Settings(Section):
    """A run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `<runs>/<name>`."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = Field(0, ge=0)
    """Seed of everything: weights, critics, data order, augmentation, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU per rank and NCCL where there are GPUs, else the CPU and gloo."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per rank inside torch operators; default: cores of the machine divided by its ranks."""
    strategy: Strategy = "decoupled"
    """How to train: decoupled, or by backpropagation as a baseline (pipelines with `training.accumulate` micro-batches
    per flush: torch's gpipe, 1f1b, interleaved_1f1b, zero_bubble and zbv, DeepSpeed's; data_parallel; or all in one
    process: backprop)."""
    stages: int = Field(2, ge=1)
    """Stages the network is cut into; one per rank (decoupled: or all in one process)."""
    cut: Literal["time", "parameters", "uniform"] | list[int] = "time"
    """Balance stages by measured time, by parameters, by number of layers, or give the layers per stage."""
    model: ModelSettings
    """The network."""
    data: DataSettings
    """The data set."""
    loss: str = "cross_entropy"
    """`cross_entropy`, `mse`, or `package.module:function` called as `function(logits, target)`."""
    critic: CriticSettings = HeadCritic()
    """The critic of every stage before the last."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer of every stage."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning-rate schedule of every stage."""
    training: TrainingSettings
    """How every stage trains."""
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
        if isinstance(self.cut, list) and (len(self.cut) != self.stages or min(self.cut, default=0) < 1):
            raise ValueError(f"cut {self.cut} must have {self.stages} entries (stages), each at least 1")
        if self.schedule.warmup >= self.training.steps:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} leaves none of training.steps {self.training.steps}"
            )
        if self.schedule.kind == "steps" and not self.schedule.milestones:
            raise ValueError("schedule.kind 'steps' needs schedule.milestones")
        for key, kinds in (("factor", ("steps",)), ("milestones", ("steps",)), ("final", ("cosine", "linear"))):
            changed = getattr(self.schedule, key) != getattr(ScheduleSettings(), key)
            if changed and self.schedule.kind not in kinds:
                raise ValueError(f"schedule.{key} has no effect with schedule.kind {self.schedule.kind!r}")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name
