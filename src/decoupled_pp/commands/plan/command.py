"""`dpp plan`: what every strategy would take, for a configured network on N ranks or a transformer on many devices."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decoupled_pp.commands.plan.predict import STRATEGIES, Prediction, Setting, predict
from decoupled_pp.commands.plan.profile import Profile, read_profile
from decoupled_pp.commands.plan.scaling import Scale, curve
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.stages import cut_stages
from decoupled_pp.commands.plan.text import describe_curves, describe_plan
from decoupled_pp.commands.plan.transformer import Transformer
from decoupled_pp.core import units
from decoupled_pp.core.errors import UsageError

if TYPE_CHECKING:
    from decoupled_pp.commands.plan.predict import Cut
    from decoupled_pp.settings.run import Settings

_Value = TypeVar("_Value")

_OF_A_CONFIG = ("ranks", "measure", "profile", "save_profile", "set")
_OF_DEVICES = (
    "parameters",
    "layers",
    "width",
    "vocabulary",
    "sequence",
    "micro_batch",
    "flops",
    "critic_share",
    "weak",
    "depth",
)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
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
    config.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
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
    parser.set_defaults(run=run_plan)


def run_plan(chosen: argparse.Namespace) -> int:
    """Plan a configured network, or draw scaling curves.

    Raises:
        UsageError: Arguments that are wrong or do not go together.
    """
    if (chosen.config is None) == (chosen.devices is None):
        raise UsageError("dpp plan takes either a configuration and --ranks, or --devices; give one of the two")
    foreign = _OF_DEVICES if chosen.devices is None else _OF_A_CONFIG
    if given := [name for name in foreign if getattr(chosen, name) not in (None, False, [])]:
        other = "a configuration" if chosen.devices is None else "--devices"
        raise UsageError(f"--{given[0].replace('_', '-')} has no effect with {other}; leave it out")
    strategies = [word.strip() for word in chosen.strategies.split(",")]
    if unknown := [kind for kind in strategies if kind not in STRATEGIES]:
        raise UsageError(f"--strategies: {unknown[0]!r} is not known; of {', '.join(STRATEGIES)}")
    if chosen.output is not None and not Path(chosen.output).parent.is_dir():
        raise UsageError(f"--output {chosen.output}: there is no folder {Path(chosen.output).parent}; make it")
    link = _usage("--link, --latency, --message-time", lambda: _link(chosen))
    text, figures = (_plan if chosen.devices is None else _scale)(chosen, strategies, link)
    if chosen.output is not None:
        Path(chosen.output).write_text(json.dumps(_plain(figures), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(text)
    return 0


def _usage(name: str, make: Callable[[], _Value]) -> _Value:
    """What `make` gives; a ValueError is the user's, named."""
    try:
        return make()
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _link(chosen: argparse.Namespace) -> Link:
    return Link(
        units.seconds(chosen.latency) if chosen.latency is not None else 0.0,
        units.bandwidth(chosen.link) if chosen.link is not None else math.inf,
        units.seconds(chosen.message_time) if chosen.message_time is not None else 0.0,
    )


def _plan(chosen: argparse.Namespace, strategies: Sequence[str], link: Link) -> tuple[str, dict[str, Any]]:
    from decoupled_pp.settings.load import load_settings

    if chosen.ranks is not None and chosen.ranks < 1:
        raise UsageError(f"--ranks {chosen.ranks} must be a whole number of at least 1; give the number of ranks")
    if chosen.profile is not None and (chosen.measure or chosen.save_profile is not None):
        raise UsageError("--profile reads a profile; leave out --measure and --save-profile, or --profile")
    settings = load_settings(chosen.config, tuple(chosen.set))
    if chosen.ranks is None:
        chosen.ranks = settings.stages
    capacity = settings.links.capacity if chosen.capacity is None else chosen.capacity
    count = 2 * chosen.ranks if chosen.micro_batches is None else chosen.micro_batches
    accumulate = settings.training.accumulate
    balance = settings.balance
    speeds = tuple(balance.speeds or ())
    limits = () if balance.memory is None else tuple(_limits(balance.memory, chosen.ranks))
    setting = _usage("plan", lambda: Setting(chosen.ranks, count, link, capacity, accumulate, speeds, limits))
    profile, cut = _profile(chosen, settings)
    predictions: dict[str, Prediction] = {}
    refused: dict[str, str] = {}
    for kind in strategies:
        try:
            predictions[kind] = predict(kind, profile, setting, cut)
        except ValueError as error:  # one strategy that cannot run does not stop the others
            refused[kind] = str(error)
    figures = {"profile": profile.source, "setting": setting, "predictions": predictions, "refused": refused}
    text = describe_plan(profile, setting, predictions, refused)
    if chosen.picture is not None:
        from decoupled_pp.commands.plan.picture import plot_cut

        if "decoupled" not in predictions:
            raise UsageError("--picture is of the decoupled cut, and --strategies leaves it out; add it")
        plot_cut(cut_stages(profile, predictions["decoupled"].boundaries, speeds), Path(chosen.picture))
        text += f"{chosen.picture}\n"
    return text, figures


def _limits(memory: str | list[str], ranks: int) -> list[int]:
    from decoupled_pp.training.memory import limits_of

    return limits_of(memory, ranks)


def _profile(chosen: argparse.Namespace, settings: Settings) -> tuple[Profile, Cut]:
    """The network's costs, read or measured, and how it may be cut."""
    from decoupled_pp.models.cutting import minmax_cut, refuse_shared

    if chosen.profile is not None:
        try:
            text = Path(chosen.profile).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--profile: cannot read {chosen.profile}: {error}; give the path of a profile") from None
        return _usage(f"--profile {chosen.profile}", lambda: read_profile(text)), minmax_cut
    save = Path(chosen.save_profile) if chosen.save_profile is not None else None
    if save is not None and not save.parent.is_dir():
        raise UsageError(f"--save-profile {save}: there is no folder {save.parent}; make it")
    profile, module = _measure(settings, chosen.ranks, chosen.config)
    if save is not None:
        save.write_text(profile.write(), encoding="utf-8")

    def cut(
        costs: Sequence[float], stages: int, closing: Sequence[Sequence[float]] | None, **devices: Any
    ) -> tuple[int, ...]:
        boundaries = minmax_cut(costs, stages, closing, **devices)
        refuse_shared(module, boundaries)
        return boundaries

    return profile, cut


def _measure(settings: Settings, ranks: int, name: str) -> tuple[Profile, Any]:
    import torch

    from decoupled_pp.commands.plan.measure import measure_profile
    from decoupled_pp.core import environment
    from decoupled_pp.core.device import choose_device
    from decoupled_pp.critics import build_critic
    from decoupled_pp.pipeline.losses import find_loss
    from decoupled_pp.settings.run import BalanceSettings
    from decoupled_pp.training.prepare import prepare

    torch.set_num_threads(settings.threads or max(1, environment.cores() // ranks))  # as a rank on this machine would
    _, _, plan = prepare(settings.model_copy(update={"stages": 1, "cut": "uniform", "balance": BalanceSettings()}))
    device = choose_device(settings.device, 0, 1)
    profile = measure_profile(
        plan.module,
        plan.sample,
        build_critic(settings.critic, settings.critic_overlap),
        stages=ranks,
        loss=find_loss(settings.loss),
        optimizer=settings.optimizer,
        device=device,
        source=name,
    )
    return profile, plan.module


def _scale(chosen: argparse.Namespace, strategies: Sequence[str], link: Link) -> tuple[str, dict[str, Any]]:
    from decoupled_pp.commands.plan.picture import plot_curves

    devices = _usage("--devices", lambda: units.whole_numbers(chosen.devices))
    sizes = {
        k: getattr(chosen, k) for k in ("layers", "width", "vocabulary", "sequence", "micro_batch", "critic_share")
    }
    for name, read in (("parameters", units.count), ("flops", units.speed)):
        text = getattr(chosen, name)
        sizes[name] = _usage(f"--{name}", lambda read=read, text=text: read(text)) if text is not None else None  # type: ignore[misc]
    model = _usage("--devices", lambda: Transformer(**{k: v for k, v in sizes.items() if v is not None}))
    scale = Scale(
        model,
        link,
        1024 if chosen.micro_batches is None else chosen.micro_batches,
        chosen.weak,
        chosen.depth or 0,
        4 if chosen.capacity is None else chosen.capacity,
    )
    curves = {kind: curve(kind, scale, devices) for kind in strategies}
    if all(isinstance(one, str) for points in curves.values() for one in points):
        raise UsageError(f"no strategy runs on any of {devices} devices: {next(iter(curves.values()))[0]}")
    picture = Path(chosen.picture or "scaling.png")
    size = (
        f"{model.total_parameters / 1e9:.3g} billion parameters, {model.layers} blocks, {model.flops / 1e12:g} TFLOP/s"
    )
    plot_curves(curves, f"{size}, critics {model.critic_share:g} of a stage", picture)
    return f"{describe_curves(scale, devices, curves)}{picture}\n", {"scale": scale, "curves": curves}


def _plain(value: Any) -> Any:
    """JSON for the figures; what is without limit becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
