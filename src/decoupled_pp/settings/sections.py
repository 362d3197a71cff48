"""Declares the sections of the settings that have a `kind` (model, data), and the base of all sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from decoupled_pp.core.paths import expanded

# Bounds far above what anybody runs, and far below what overflows, or is waited for without end.
Few = Annotated[int, Field(ge=1, le=10_000)]
"""Layers, heads, stages."""
Size = Annotated[int, Field(ge=1, le=10**6)]
"""Units, channels, features, classes."""
Count = Annotated[int, Field(ge=1, le=10**9)]
"""Steps, packets, samples, tokens."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""A factor that may leave something out."""
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A factor that something is multiplied with, or divided by."""
PathText = Annotated[str, AfterValidator(expanded)]
"""A path, or a name on a hub."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, a yes/no value is no number, and checked settings are frozen."""

    # Infinity passes a bound such as `gt=0`, and NaN makes every later comparison false.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        # pydantic takes true for 1. A validator of single fields would be refused on `kind`, which tells unions apart.
        if isinstance(values, str) and "kind" in cls.model_fields:  # `schedule: cosine`
            return {"kind": values}
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                text = "a yes/no value cannot be used here; quote it if it is meant as text"
                raise PydanticCustomError("yes_no", text, {"field": key, "value": value})
        return values


def section_types(annotation: Any) -> list[type[Section]]:
    """Return the sections that a key may hold: none for a plain value, several for a `kind`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in section_types(part)]


def kinds_of(section: type[Section]) -> tuple[str, ...]:
    """Return the kinds that a section is for; none if it has no `kind` among fixed ones."""
    field = section.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)


class Factory(Section):
    """A part of your own, made by a function that is named here."""

    kind: Literal["factory"]
    factory: str
    """`package.module:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function."""


class GptModel(Section):
    """Byte/BPE GPT: pre-norm decoder with causal attention. Layers: embedding, `depth` blocks, head."""

    kind: Literal["gpt"]
    width: Size = 128
    """Width of the residual stream; a multiple of `heads`."""
    depth: Few = 4
    """Number of transformer blocks."""
    heads: Few = 4
    """Attention heads per block."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability after embedding, attention and MLP."""

    @model_validator(mode="after")
    def _width_divides(self) -> GptModel:
        if self.width % self.heads:
            heads = f"`model.heads` {self.heads}"
            raise ValueError(f"`model.width` {self.width} is not a multiple of {heads}; change one of them")
        return self


class ResnetModel(Section):
    """CIFAR ResNet (He et al. 2016, section 4.2): stem, (depth-2)/2 basic blocks in three widths, head."""

    kind: Literal["resnet"]
    depth: Literal[8, 14, 20, 26, 32, 44, 56, 110] = 20
    """Number of weighted layers, 6n+2."""
    width: Size = 16
    """Channels of the first of the three groups of blocks; each next group has twice as many."""


class VggModel(Section):
    """The VGG-like network of local critic training (Lee & Lee 2019): 11 3x3 convolutions in four widths and a head."""

    kind: Literal["vgg"]
    width: Size = 64
    """Channels of the first group (paper: 64); each next group has twice as many."""


class MlpModel(Section):
    """Multi-layer perceptron on the flattened input."""

    kind: Literal["mlp"]
    width: Size = 256
    """Units per hidden layer."""
    depth: Few = 4
    """Number of hidden layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability after every hidden layer."""


class FactoryModel(Factory):
    """Your own network: `function(info, **arguments)` returns an `nn.Sequential` or a list of layers (`DataInfo`)."""


class HuggingFaceModel(Section):
    """A Hugging Face `transformers` model (extra `hf`), split at its blocks."""

    kind: Literal["huggingface"]
    path: PathText | None = None
    """Name on the hub, or a local folder with its `config.json`."""
    type: str | None = None
    """Instead of a path: an architecture with fresh weights, by its `model_type`, such as `llama` or `vit`."""
    head: Literal["causal_lm", "masked_lm", "sequence_classification", "image_classification"] | None = None
    """Layers on top; default: those for the data's targets."""
    pretrained: bool = True
    """Load the weights of `path`; false: fresh ones, from its config alone."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Changes of its config, such as `{num_hidden_layers: 8}`."""
    meta: bool = False
    """Build it on the meta device, for a model larger than one machine's memory: every rank makes its own stage, or
    loads it from the safetensors files of the folder `path`."""

    @model_validator(mode="after")
    def _one_origin(self) -> HuggingFaceModel:
        if (self.path is None) == (self.type is None):
            raise ValueError("give either `model.path` or `model.type`")
        return self


ModelSettings = Annotated[
    GptModel | ResnetModel | VggModel | MlpModel | HuggingFaceModel | FactoryModel, Field(discriminator="kind")
]


class BatchSettings(Section):
    """Base of the sections of all data sets."""

    batch_size: Count = 32
    """Samples per packet (micro-batch)."""
    validation_batch_size: Count | None = None
    """Samples per packet in validation; default: `batch_size`."""


class ImageSettings(BatchSettings):
    """Base of the sections of image data sets."""

    augment: bool = False
    """Standard augmentation of training images: pad by 4 and crop at random, flip left-right at random."""


class TokenSettings(BatchSettings):
    """Base of the sections of token data sets."""

    context: Count = 128
    """Tokens per sample; of sentences (a text column with a `label_column`) the most."""
    target: Literal["next_token", "masked_tokens"] = "next_token"
    """Tokens to predict: every next one, or those that are masked (needs a tokenizer that has a mask token)."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens to predict, for `masked_tokens`; 80 % of them are masked, 10 % replaced, 10 % kept."""
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


class LookUpData(BatchSettings):
    """Look-ups of several hops in a random table: synthetic, exact, and unsolvable below a number of layers."""

    kind: Literal["look_up"]
    nodes: int = Field(8, ge=2, le=10_000)
    """Entries of the table; also the vocabulary."""
    hops: Few = 4
    """The most hops of a question."""
    questions: Count = 2
    """Questions of every number of hops in a sample; at most `nodes`."""
    validation_samples: Count = 512
    """Held-out samples."""

    @model_validator(mode="after")
    def _asks_of_the_table(self) -> LookUpData:
        if self.questions > self.nodes:
            raise ValueError(f"`data.questions` {self.questions} is more than `data.nodes` {self.nodes}; lower it")
        return self


class TextData(TokenSettings):
    """Any text files, as bytes or through a tokenizer."""

    kind: Literal["text"]
    files: list[PathText] = Field(min_length=1)
    """Glob patterns of the files, relative to the working directory; `**` is recursive."""
    tokenizer: PathText | None = None
    """A `tokenizers` file, the folder or hub name of a model (`transformers`), or a folder with GPT-2's `encoder.json`
    and `vocab.bpe`; default: bytes."""


class IdxData(ImageSettings):
    """MNIST / Fashion-MNIST: the four IDX files (`train-images-idx3-ubyte` ..., plain or .gz) of one folder."""

    kind: Literal["idx"]
    folder: PathText
    """Folder of the four files."""


class CifarBinaryData(ImageSettings):
    """CIFAR-10: the official binary records (`data_batch_1.bin` .. `data_batch_5.bin`, `test_batch.bin`)."""

    kind: Literal["cifar_binary"]
    folder: PathText
    """Folder of the files."""


BUILDERS = (
    "arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "videofolder", "webdataset",
    "xml",
)  # fmt: skip
"""Names that `datasets` takes for a reader of files, not for a data set."""


class HuggingFaceData(TokenSettings):
    """A Hugging Face `datasets` text or image data set (extra `hf`), streamed or loaded."""

    kind: Literal["huggingface"]
    path: PathText
    """Name on the hub, a local folder, or a builder name such as `json`, `text`, `parquet`, `imagefolder`."""
    config: str | None = None
    """Configuration name of the data set."""
    data_files: dict[str, PathText | list[PathText]] | None = None
    """Files per split, as in `datasets.load_dataset`; a builder name needs them."""
    streaming: bool = False
    """Read on the fly instead of loading first; shuffled in a buffer."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; default: hold out `validation_fraction` of the train split (not with streaming)."""
    text_column: str | None = None
    """Column with text: a token data set."""
    tokenizer: PathText | None = None
    """As in `text`; default: bytes."""
    image_column: str | None = None
    """Column with images: an image data set."""
    label_column: str | None = None
    """Column with integer class labels; default for images: `label`. With a text column: every row is a sentence to
    classify, padded to the longest of its micro-batch."""
    shuffle_buffer: Count = 1000
    """Samples in the shuffle buffer when streaming."""

    @model_validator(mode="after")
    def _fits_together(self) -> HuggingFaceData:
        if (self.text_column is None) == (self.image_column is None):
            raise ValueError("give exactly one of `data.text_column` and `data.image_column`")
        if self.label_column is not None and self.label_column in {self.text_column, self.image_column}:
            same = f"names the same column, {self.label_column!r}, as `data.text_column` or `data.image_column`"
            raise ValueError(f"`data.label_column` {same}; name another one")
        if self.target != "next_token" and (self.image_column or self.label_column):
            remedy = "leave `data.label_column` and `data.image_column` out"
            raise ValueError(f"`data.target` {self.target} is for text without labels; {remedy}")
        if self.path in BUILDERS and self.data_files is None:  # it would read whatever lies in the working directory
            remedy = "give them, e.g. {train: 'texts/*'}, or name a folder or a data set on the hub"
            raise ValueError(f"`data.path` {self.path!r} is a builder and needs `data.data_files`; {remedy}")
        return self


class FactoryData(BatchSettings, Factory):
    """Your own data: `function(settings, seed, **arguments)` returns a `decoupled_pp.Data`; `settings` is this one."""


DataSettings = Annotated[
    DigitsData | PythonSourceData | LookUpData | TextData | IdxData | CifarBinaryData | HuggingFaceData | FactoryData,
    Field(discriminator="kind"),
]
