"""InfoPro: lowers the run's loss, and rebuilds the input image from the stage's output (Wang et al. 2021).

The image travels in the packet as far as the last critic. Legend: B batch, C channels, H x W image, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, first_tensor
from decoupled_pp.critics.requirements import critic_unfit, judged_tensor, relative_position
from decoupled_pp.settings.critics import InfoproCritic

_EPSILON = 1e-8  # a channel of one value would divide by 0


class Infopro(Critic):
    """A classifier and a decoder.

    (B, C, H, W) -> conv3x3, BN, ReLU, pool, linear, ReLU, linear -> (B, K); decoder -> the image.
    """

    def __init__(self, context: CriticContext, hidden: Tensor, settings: InfoproCritic) -> None:
        super().__init__()
        image = first_tensor(context.sample)
        channels = hidden.shape[1]
        width = settings.width
        self.first = context.stage == 0
        self.last = context.stage == context.stages - 2
        position = relative_position(context.stage, context.stages)
        self.reconstruction = _between(settings.reconstruction, position)
        self.prediction = _between(settings.prediction, position)
        self.size = tuple(image.shape[2:])
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, settings.features),
            nn.ReLU(),
            nn.Linear(settings.features, context.output.shape[1]),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, image.shape[1], 3, padding=1),
        )

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.classifier(first_tensor(hidden))
        return logits

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return l1 R(x | h) + l2 loss(a(h), y).

        R is the binary cross-entropy of the rebuilt image; both weights are linear in the stage's index.
        """
        image = scaled(first_tensor(self._image(view)))
        enlarged = functional.interpolate(
            first_tensor(view.hidden), size=self.size, mode="bilinear", align_corners=True
        )
        # With logits: sigmoid and logarithm in one lose no digits where the decoder is sure of a pixel.
        rebuilt = functional.binary_cross_entropy_with_logits(self.decoder(enlarged), image)
        return self.reconstruction * rebuilt + self.prediction * loss(self(view.hidden), view.target)

    def rider(self, view: View) -> Payload:
        """Return the image, for the next critic; the last stage has none."""
        return () if self.last else self._image(view)

    def _image(self, view: View) -> Payload:
        return view.inputs if self.first else view.rider


def scaled(image: Tensor) -> Tensor:
    """Scale every channel of (B, C, H, W) to 0 .. 1 by its range in the micro-batch (paper: by constants)."""
    lowest = image.amin(dim=(0, 2, 3), keepdim=True)
    highest = image.amax(dim=(0, 2, 3), keepdim=True)
    return (image - lowest) / (highest - lowest + _EPSILON)


def _between(ends: list[float], position: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * position


def build_infopro(settings: InfoproCritic, context: CriticContext) -> Infopro:
    """Build the InfoPro critic of one stage.

    Source: Wang et al. 2021 (ICLR, 2101.10832), equation 5 and appendix.
    """
    hidden = judged_tensor("infopro", context, (4,))
    image = context.sample
    if not isinstance(image, Tensor) or image.dim() != 4 or not image.is_floating_point():
        raise critic_unfit(
            context, "critic infopro rebuilds the input image, but the network's input is no single image tensor"
        )
    return Infopro(context, hidden, settings).to(device=hidden.device, dtype=hidden.dtype)
