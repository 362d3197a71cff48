"""Declares the `critic` section of the settings: one class for every kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from decoupled_pp.settings.sections import Factory, Few, Scale, Section, Size, Weight


class AutoCritic(Section):
    """The critic measured to serve a kind of network best (docs/critics.md), chosen by the form of a stage's output."""

    kind: Literal["auto"] = "auto"


class HeadCritic(Section):
    """Pool + linear; for tokens norm + vocabulary projection. The cheapest critic."""

    kind: Literal["head"] = "head"
    weights: Literal["fresh", "network"] = "fresh"
    """fresh; or network: a copy of the network's last layer with its weights, for one that is trained already."""


class ConvCritic(Section):
    """The critic of local critic training (Lee & Lee 2019): 3x3 convolutions and a linear layer; images."""

    kind: Literal["conv"]
    convolutions: Few = 1
    """3x3 convolutions, each with a ReLU (paper: 1; 3 to 5 were tried)."""
    channels: Size = 128
    """Channels of each (paper: 128)."""


class MlpSrCritic(Section):
    """Spatially reduced MLP head of decoupled greedy learning (Belilovsky et al. 2020); images and vectors."""

    kind: Literal["mlp_sr"]
    convolutions: int = Field(3, ge=0, le=10_000)
    """1x1 convolutions after the spatial reduction (paper: 3)."""
    linears: int = Field(3, ge=0, le=10_000)
    """Hidden linear layers before the output layer (paper: 3)."""


class AuglocalCritic(Section):
    """A fresh copy of layers sampled uniformly from those above the stage, then the head (AugLocal, Ma et al. 2024)."""

    kind: Literal["auglocal"]
    depth: Few = 2
    """Sampled layers of the critic of the first stage (d)."""
    pyramid: float = Field(0.5, ge=0, le=1)
    """Share of `depth` taken off linearly towards the last critic (c in the paper)."""
    resolution: Size | None = None
    """Images are average-pooled to at most this height and width first; default: they are not."""
    width: float = Field(1.0, gt=0, le=1)
    """Share of the channels (tokens: of the width) that the copies have, after a projection; paper: all."""
    norm: Literal["shallow", "never"] = "shallow"
    """shallow: fresh critics of images normalise before their linear layer at depth 1 (the authors' code); or never."""
    weights: Literal["fresh", "network"] = "fresh"
    """fresh; or network: copies and head begin with the network's own weights, for one that is trained already."""


class PredsimCritic(Section):
    """Prediction and similarity matching (Nokland & Eidnes 2019): one label each; images and vectors."""

    kind: Literal["predsim"]
    similarity: float = Field(0.99, ge=0, le=1)
    """Share of the similarity loss (b in the paper: 0.99)."""
    features: Size = 4096
    """Most features, after average pooling, that the linear prediction is given (paper: 2048 or 4096, code: 4096)."""
    pooling: Literal["rectangular", "square"] = "rectangular"
    """rectangular: height is halved, then width if need be, rounded up (the authors' code). square: both, down."""


class InfoproCritic(Section):
    """Information propagation (Wang et al. 2021): also rebuild the input image, which travels in the packet."""

    kind: Literal["infopro"]
    reconstruction: list[Weight] = Field([5.0, 0.5], min_length=2, max_length=2)
    """Weight of the reconstruction loss at the first and at the last critic, linear in between."""
    prediction: list[Weight] = Field([0.5, 0.5], min_length=2, max_length=2)
    """Weight of the run's loss at the first and at the last critic, linear in between."""
    width: Size = 12
    """Channels inside the decoder (paper: 12)."""
    features: Size = 128
    """Hidden units of the classifier (paper: 128)."""


class LlsCritic(Section):
    """Layer-wise learning with fixed sinusoids (Apolinario & Roy 2025): no trained parameters; one label each."""

    kind: Literal["lls"]
    pooled: Few = 4
    """Images are pooled to this height and width, vectors to so many features (the authors' code: 4)."""
    vectors: Literal["pooled", "whole"] = "pooled"
    """whole: vectors are taken as they are."""
    temperature: Scale = 0.5
    """T, by which the logits are divided (the authors' code: 0.5)."""


class NeuronGroupsCritic(Section):
    """Groups of channels with a critic each, made to differ (Patel et al. 2023, GN-DGL); one label each."""

    kind: Literal["neuron_groups"]
    groups: int = Field(2, ge=2, le=10_000)
    """Groups, G; the channels of a stage's output must divide by it."""
    base: Literal["head", "mlp_sr"] = "head"
    """The critic of every group; it sees the other groups' channels too, without a gradient into them."""
    diversity: Weight = 0.5
    """Weight of the mean pairwise cosine between the groups' softened wrong-class distributions (paper: 0.5)."""
    temperature: Scale = 3.0
    """Temperature that softens them (paper: 3)."""


class CollaborativeCritic(Section):
    """Several heads that also learn from each other's consensus (Song & Chai 2018); their gradient is rescaled."""

    kind: Literal["collaborative"]
    heads: int = Field(2, ge=2, le=10_000)
    """Heads, H; the gradient into the stage is that of all heads divided by H."""
    base: Literal["head", "mlp_sr"] = "head"
    """Kind of every head."""
    label_share: float = Field(0.5, ge=0, le=1)
    """Share of the labels' loss; the rest is that of the others' consensus (beta in the paper)."""
    temperature: Scale = 2.0
    """Temperature that softens the consensus (T in the paper)."""


class SgrCritic(Section):
    """Successive gradient reconciliation (Yang et al. 2024): the previous stage's delta travels forward."""

    kind: Literal["sgr"]
    base: Literal["head", "mlp_sr"] = "head"
    """Kind of head that makes the logits of a stage."""
    weight: Weight = 0.1
    """Weight of the distance between this stage's gradient for its input and the previous stage's delta (lambda)."""
    distance: Literal["cosine", "l2"] = "cosine"
    """Per sample: 1 - cosine, or the squared difference over the delta's own square."""


class ReconstructCritic(Section):
    """Local post-training (LoPT): rebuild what the stage was given, so that little of it is lost; for fine-tuning.

    It makes no logits, so the stage has no exit.
    """

    kind: Literal["reconstruct"]
    decoder: Literal["mlp", "linear"] = "mlp"
    """mlp: norm, linear to a quarter, GELU, linear back (LoPT). linear: one layer, each stage with all of `weight`."""
    weight: Scale = 10.0
    """Weight of the mean squared error averaged over the stages before the last (lambda; LoPT: 10)."""


class VocabularyCritic(Section):
    """A head for large vocabularies that is cheap to train: fewer tokens, a lower rank, fewer or hashed classes."""

    kind: Literal["vocabulary"]
    tokens: float = Field(1.0, gt=0, le=1)
    """Share of a micro-batch's positions that the loss is computed on, drawn anew for every packet."""
    rank: Size | None = None
    """Rank of the projection to the vocabulary; default: full."""
    classes: Size | None = None
    """Sampled softmax: so many classes, drawn anew for every packet, stand for all that are not the target."""
    buckets: int | None = Field(None, ge=2, le=10**6)
    """Hashed softmax: `hashes` random hash functions map the classes to so many buckets, which are predicted."""
    hashes: Few = 2
    """Hash functions, with `buckets`."""

    @model_validator(mode="after")
    def _one_softmax(self) -> VocabularyCritic:
        if self.classes is not None and self.buckets is not None:
            raise ValueError("give at most one of `critic.classes` (sampled) and `critic.buckets` (hashed softmax)")
        return self


class FactoryCritic(Factory):
    """Your own critic: `function(context, **arguments)` builds an `nn.Module` from stage output to logits."""


# The discriminator makes pydantic try one member alone: otherwise a fault would be reported for every member.
CriticSettings = Annotated[
    AutoCritic
    | HeadCritic
    | ConvCritic
    | MlpSrCritic
    | AuglocalCritic
    | PredsimCritic
    | InfoproCritic
    | LlsCritic
    | NeuronGroupsCritic
    | CollaborativeCritic
    | SgrCritic
    | ReconstructCritic
    | VocabularyCritic
    | FactoryCritic,
    Field(discriminator="kind"),
]
