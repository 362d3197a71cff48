"""The command line of `dpp plan`: a configured network on N ranks, or a transformer on many devices."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decoupled_pp.commands.arguments import add_overrides, check_at_least, flag, output_file, strategies_of
from decoupled_pp.commands.plan.costs import Profile, read_profile, stage_costs
from decoupled_pp.commands.plan.predict import STRATEGIES, Prediction, Setting, predict
from decoupled_pp.commands.plan.scaling import Scale, curve
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.text import describe_curves, describe_plan
from decoupled_pp.commands.plan.transformer import Transformer
from decoupled_pp.core import units
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.paths import expanded
from decoupled_pp.core.records import write_json

if TYPE_CHECKING:
    from decoupled_pp.commands.plan.predict import Cut
    from decoupled_pp.settings.run import Settings

_Value = TypeVar("_Value")

_FOR_CONFIG = ("ranks", "measure", "profile", "save_profile", "set")
_SIZES = ("layers", "width", "vocabulary", "sequence", "micro_batch", "critic_share")
_FOR_DEVICES = ("parameters", "flops", *_SIZES, "weak", "depth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp plan`."""
    parser.add_argument("config", nargs="?", help="YAML file with the settings: plan this network for --ranks")
    parser.add_argument(
        "--strategies", default=",".join(STRATEGIES), help=f"comma-separated, of {', '.join(STRATEGIES)}"
    )
    parser.add_argument(
        "--micro-batches", type=int, help="per optimizer step (default: 2 x ranks; with --devices 1024)"
    )
    parser.add_argument("--link", help="bandwidth of every link, e.g. 25GB/s (default: no limit)")
    parser.add_argument("--latency", help="latency of every link, e.g. 5us (default: none)")
    parser.add_argument("--message-time", help="time that handing over a message keeps its rank busy (default: none)")
    parser.add_argument("--capacity", type=int, help="packets a decoupled link may hold (default: the settings', or 4)")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument(
        "--picture", help="PNG file: of the decoupled cut, or with --devices of the curves (default: scaling.png)"
    )
    config = parser.add_argument_group("a configured network")
    config.add_argument("--ranks", type=int, help="number of ranks (default: the settings' stages)")
    config.add_argument(
        "--measure", action="store_true", help="measure the network here (the default without --profile)"
    )
    config.add_argument("--profile", help="read what --save-profile wrote instead of measuring")
    config.add_argument("--save-profile", help="write what was measured to this JSON file")
    add_overrides(config)
    curves = parser.add_argument_group("scaling curves of a transformer, nothing measured")
    curves.add_argument("--devices", help="comma-separated numbers of devices, e.g. 8,64,512,4096")
    curves.add_argument("--parameters", help="in all, e.g. 7B (default: 12 layers width^2 + 2 vocabulary width)")
    curves.add_argument("--layers", type=int, help="blocks (default: 32)")
    curves.add_argument("--width", type=int, help="of the residual stream (default: 4096)")
    curves.add_argument("--vocabulary", type=int, help="tokens (default: 32000)")
    curves.add_argument("--sequence", type=int, help="tokens per sample (default: 4096)")
    curves.add_argument("--micro-batch", type=int, help="samples per micro-batch (default: 1)")
    curves.add_argument("--flops", help="speed that a device reaches (default: 400TFLOP/s)")
    curves.add_argument(
        "--critic-share", type=float, help="of its stage's time, parameters, activations (default: 0.1)"
    )
    curves.add_argument("--weak", action="store_true", help="--micro-batches per replica instead of in all")
    curves.add_argument("--depth", type=int, help="deepest pipeline (default: as deep as there are blocks)")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Plans a configured network, or draws scaling curves."""
    if (chosen.config is None) == (chosen.devices is None):
        raise UsageError(
            "dpp plan takes either a configuration and --ranks, or --devices; give one of the two",
            code="options-contradict",
        )
    _refuse_ignored(chosen)
    strategies = strategies_of(chosen.strategies, STRATEGIES)
    output = output_file("--output", chosen.output)
    output_file("--picture", chosen.picture)
    link = Link(
        latency=_read(chosen, "latency", units.seconds, 0.0),
        bandwidth=_read(chosen, "link", units.bandwidth, math.inf),
        host=_read(chosen, "message_time", units.seconds, 0.0),
    )
    plan = _plan_network if chosen.devices is None else _plan_devices
    text, figures = plan(chosen, strategies, link)
    if output is not None:
        output.write_text(write_json(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(text)
    return 0


def _refuse_ignored(chosen: argparse.Namespace) -> None:
    """Raises UsageError for an option that would do nothing."""
    ignored, other = (_FOR_DEVICES, "a configuration") if chosen.devices is None else (_FOR_CONFIG, "--devices")
    for name in ignored:
        if getattr(chosen, name) not in (None, False, []):
            raise UsageError(f"{flag(name)} has no effect with {other}; leave it out", code="option-without-effect")
    if chosen.profile is not None and (chosen.measure or chosen.save_profile is not None):
        raise UsageError(
            "--profile reads a profile; leave out --measure and --save-profile, or --profile", code="options-contradict"
        )


def _read(chosen: argparse.Namespace, name: str, read: Callable[[str], _Value], default: _Value) -> _Value:
    """Reads the value of an option that has a unit, such as 25GB/s."""
    text = getattr(chosen, name)
    if text is None:
        return default
    try:
        return read(text)
    except ValueError as error:
        raise UsageError(f"{flag(name)}: {error}", code="option-unreadable") from None


def _plan_network(chosen: argparse.Namespace, strategies: Sequence[str], link: Link) -> tuple[str, dict[str, Any]]:
    """Returns the text and the figures for a configured network."""
    from decoupled_pp.settings.load import load_settings

    settings = load_settings(chosen.config, tuple(chosen.set))
    if chosen.ranks is None:
        chosen.ranks = settings.stages
    check_at_least(chosen, ranks=1)
    if chosen.picture is not None and "decoupled" not in strategies:
        raise UsageError(
            "--picture is of the decoupled cut, and --strategies leaves it out; add it", code="options-contradict"
        )
    setting = _setting(chosen, settings, link)
    profile, cut = _profile(chosen, settings)
    predictions: dict[str, Prediction] = {}
    refused: dict[str, str] = {}
    for kind in strategies:
        try:
            _refuse_rule(kind, settings)
            predictions[kind] = predict(kind, profile, setting, cut)
        except UsageError as error:  # a strategy that cannot run does not stop the others
            refused[kind] = str(error)
    figures = {
        "profile": profile.source,
        "setting": asdict(setting),
        "predictions": {kind: asdict(one) for kind, one in predictions.items()},
        "refused": refused,
    }
    text = describe_plan(profile, setting, predictions, refused)
    if chosen.picture is not None:
        from decoupled_pp.commands.plan.picture import plot_cut  # matplotlib takes a second to import

        if "decoupled" in refused:
            raise UsageError(
                f"--picture is of the decoupled cut, and there is none: {refused['decoupled']}", code="nothing-to-draw"
            )
        boundaries = predictions["decoupled"].boundaries
        plot_cut(stage_costs(profile, boundaries, critics=True, speeds=setting.speeds), Path(expanded(chosen.picture)))
        text += f"{chosen.picture}\n"
    return text, figures


def _refuse_rule(strategy: str, settings: Settings) -> None:
    if strategy == "decoupled" and not settings.critic_target.critic_passes:
        raise UsageError(
            f"`critic_target` {settings.critic_target.kind} is not planned: predictions are of stages with critics; "
            "leave it out, or plan other --strategies",
            code="rule-not-planned",
            key="critic_target",
        )


def _setting(chosen: argparse.Namespace, settings: Settings, link: Link) -> Setting:
    limits: list[int] = []  # bytes of each rank's device
    if settings.balance.memory is not None:
        from decoupled_pp.training.memory import limits_of

        limits = limits_of(settings.balance.memory, chosen.ranks)
    return Setting(
        ranks=chosen.ranks,
        micro_batches=2 * chosen.ranks if chosen.micro_batches is None else chosen.micro_batches,
        link=link,
        capacity=settings.links.capacity if chosen.capacity is None else chosen.capacity,
        accumulate=settings.training.accumulate,
        speeds=tuple(settings.balance.speeds or ()),
        memory=tuple(limits),
    )


def _profile(chosen: argparse.Namespace, settings: Settings) -> tuple[Profile, Cut]:
    """Reads or measures the network's costs; returns them, and how it may be cut."""
    from decoupled_pp.models.cutting import minmax_cut, refuse_shared  # torch takes seconds to import

    if chosen.profile is not None:
        try:
            text = Path(expanded(chosen.profile)).read_bytes()
        except OSError as error:
            raise UsageError(
                f"--profile: cannot read {chosen.profile}: {error.strerror}; give the path of a profile",
                code="profile-unreadable",
            ) from None
        return read_profile(text, f"--profile {chosen.profile}"), minmax_cut
    from decoupled_pp.commands.plan.measure import measure_configured

    saved = output_file("--save-profile", chosen.save_profile)
    profile, module = measure_configured(settings, chosen.ranks, chosen.config)
    if saved is not None:
        saved.write_text(profile.write(), encoding="utf-8")

    def cut(*arguments: Any, **devices: Any) -> tuple[int, ...]:
        boundaries = minmax_cut(*arguments, **devices)
        refuse_shared(module, boundaries)
        return boundaries

    return profile, cut


def _plan_devices(chosen: argparse.Namespace, strategies: Sequence[str], link: Link) -> tuple[str, dict[str, Any]]:
    """Returns the text and the figures of scaling curves, and draws them."""
    from decoupled_pp.commands.plan.picture import plot_curves

    devices: list[int] = _read(chosen, "devices", units.whole_numbers, [])
    sizes = {name: getattr(chosen, name) for name in _SIZES}
    sizes["parameters"] = _read(chosen, "parameters", units.count, None)
    sizes["flops"] = _read(chosen, "flops", units.speed, None)
    model = Transformer(**{name: size for name, size in sizes.items() if size is not None})
    scale = Scale(
        model,
        link,
        micro_batches=1024 if chosen.micro_batches is None else chosen.micro_batches,
        weak=chosen.weak,
        depth=chosen.depth or 0,
        capacity=4 if chosen.capacity is None else chosen.capacity,
    )
    curves = {kind: curve(kind, scale, devices) for kind in strategies}
    if all(isinstance(one, str) for points in curves.values() for one in points):
        reason = next(iter(curves.values()))[0]
        raise UsageError(f"no strategy runs on any of {devices} devices: {reason}", code="nothing-to-predict")
    picture = Path(expanded(chosen.picture or "scaling.png"))
    title = (
        f"{model.total_parameters / 1e9:.3g} billion parameters, {model.layers} blocks, "
        f"{model.flops / 1e12:g} TFLOP/s, critics {model.critic_share:g} of a stage"
    )
    plot_curves(curves, title, picture)
    points = {kind: [one if isinstance(one, str) else asdict(one) for one in row] for kind, row in curves.items()}
    figures = {"scale": asdict(scale), "curves": points}
    return f"{describe_curves(scale, devices, curves)}{picture}\n", figures
