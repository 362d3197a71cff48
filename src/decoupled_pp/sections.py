"""The sections of the settings that have a `kind` (model, data, critic), and what all sections share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, yes/no is no number, settings do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(
                    f"{key} takes no yes/no value, not {str(value).lower()}; quote it if it is meant as text"
                )
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


BUILDERS = (
    "arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "videofolder", "webdataset",
    "xml",
)  # fmt: skip
"""Names that `datasets` takes for a reader of files, not for a data set."""


class HuggingFaceData(TokenSettings):
    """A Hugging Face `datasets` text or image data set (extra `hf`), streamed or loaded."""

    kind: Literal["huggingface"]
    path: str
    """Name on the hub, a local folder, or a builder name such as `json`, `text`, `parquet`, `imagefolder`."""
    config: str | None = None
    """Configuration name of the data set."""
    data_files: dict[str, str | list[str]] | None = None
    """Files per split, as in `datasets.load_dataset`; a builder name needs them."""
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

    @model_validator(mode="after")
    def _builder_has_files(self) -> HuggingFaceData:
        if self.path in BUILDERS and self.data_files is None:  # it would read whatever lies in the working directory
            raise ValueError(
                f"path {self.path!r} is a builder and needs data_files, e.g. {{train: 'texts/*'}}; "
                "or give a folder or a name on the hub"
            )
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


class PredsimCritic(Section):
    """Prediction and similarity matching (Nokland & Eidnes 2019): one label each; images and vectors."""

    kind: Literal["predsim"]
    similarity: float = Field(0.99, ge=0, le=1)
    """Share of the similarity loss (b in the paper: 0.99)."""
    features: int = Field(2048, ge=1)
    """Largest number of features, after average pooling, that the linear prediction is given (paper: 2048 or 4096)."""


class InfoproCritic(Section):
    """Information propagation (Wang et al. 2021): also rebuild the input image, which travels in the packet."""

    kind: Literal["infopro"]
    reconstruction: tuple[float, float] = (5.0, 0.5)
    """Weight of the reconstruction loss at the first and at the last critic, linear in between."""
    prediction: tuple[float, float] = (0.5, 0.5)
    """Weight of the run's loss at the first and at the last critic, linear in between."""
    width: int = Field(12, ge=1)
    """Channels inside the decoder (paper: 12)."""
    features: int = Field(128, ge=1)
    """Hidden units of the classifier (paper: 128)."""


class LlsCritic(Section):
    """Layer-wise learning with fixed sinusoids (Apolinario & Roy 2025): no trained parameters; one label each."""

    kind: Literal["lls"]
    pooled: int = Field(4, ge=1)
    """Images are pooled to this height and width; vectors are taken as they are."""
    temperature: float = Field(1.0, gt=0)
    """T, by which the logits are divided."""


class NeuronGroupsCritic(Section):
    """Groups of channels with a critic each, made to differ (Patel et al. 2023, GN-DGL); one label each."""

    kind: Literal["neuron_groups"]
    groups: int = Field(2, ge=2)
    """Groups, G; the channels of a stage's output must divide by it."""
    base: Literal["head", "mlp_sr"] = "head"
    """The critic of every group; it sees the other groups' channels too, without a gradient into them."""
    diversity: float = Field(0.5, ge=0)
    """Weight of the mean pairwise cosine between the groups' softened wrong-class distributions (paper: 0.5)."""
    temperature: float = Field(3.0, gt=0)
    """What softens them (paper: 3)."""


class CollaborativeCritic(Section):
    """Several heads that also learn from each other's consensus (Song & Chai 2018); their gradient is rescaled."""

    kind: Literal["collaborative"]
    heads: int = Field(2, ge=2)
    """Heads, H; the gradient into the stage is that of all heads divided by H."""
    base: Literal["head", "mlp_sr"] = "head"
    """What every head is."""
    label_share: float = Field(0.5, ge=0, le=1)
    """Share of the labels' loss; the rest is that of the others' consensus (beta in the paper)."""
    temperature: float = Field(2.0, gt=0)
    """What softens the consensus (T in the paper)."""


class SgrCritic(Section):
    """Successive gradient reconciliation (Yang et al. 2024): the previous stage's delta travels forward."""

    kind: Literal["sgr"]
    base: Literal["head", "mlp_sr"] = "head"
    """What makes the logits of a stage."""
    weight: float = Field(0.1, ge=0)
    """Weight of the distance between this stage's gradient for its input and the previous stage's delta (lambda)."""
    distance: Literal["cosine", "l2"] = "cosine"
    """Per sample: 1 - cosine, or the squared difference over the delta's own square."""


class VocabularyCritic(Section):
    """A head for large vocabularies that is cheap to train: fewer tokens, a lower rank, fewer or hashed classes."""

    kind: Literal["vocabulary"]
    tokens: float = Field(1.0, gt=0, le=1)
    """Share of a micro-batch's positions that the loss is computed on, drawn anew for every packet."""
    rank: int | None = Field(None, ge=1)
    """Rank of the projection to the vocabulary; default: full."""
    classes: int | None = Field(None, ge=1)
    """Sampled softmax: so many classes, drawn anew for every packet, stand for all that are not the target."""
    buckets: int | None = Field(None, ge=2)
    """Hashed softmax: `hashes` random hash functions map the classes to so many buckets, which are predicted."""
    hashes: int = Field(2, ge=1)
    """Hash functions, with `buckets`."""

    @model_validator(mode="after")
    def _one_softmax(self) -> VocabularyCritic:
        if self.classes is not None and self.buckets is not None:
            raise ValueError("give at most one of classes (sampled softmax) and buckets (hashed softmax)")
        return self


class FactoryCritic(Factory):
    """Your own critic: `function(context, **arguments)` builds an `nn.Module` from stage output to logits."""


CriticSettings = Annotated[
    HeadCritic
    | MlpSrCritic
    | AuglocalCritic
    | PredsimCritic
    | InfoproCritic
    | LlsCritic
    | NeuronGroupsCritic
    | CollaborativeCritic
    | SgrCritic
    | VocabularyCritic
    | FactoryCritic,
    Field(discriminator="kind"),
]
