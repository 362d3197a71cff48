"""Implements the public `Trainer`: the same script trains in one process and under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoupled_pp.core.arguments import expect_function
from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.pipeline.losses import LossChoice, find_loss
from decoupled_pp.settings.rules import CorrectionSettings
from decoupled_pp.settings.script_names import SCRIPT_NAMES, TRAINER_SECTIONS
from decoupled_pp.settings.sections import Section
from decoupled_pp.training.base import Observer
from decoupled_pp.training.choices import (
    CorrectionChoice,
    CriticChoice,
    OptimizerChoice,
    RuleChoice,
    ScheduleChoice,
    choose_critic,
    choose_folder,
    choose_optimizer,
    choose_rule,
    choose_schedule,
    choose_section,
    choose_value,
)
from decoupled_pp.training.decoupled import DecoupledTrainer
from decoupled_pp.training.recipe import Recipe
from decoupled_pp.training.script_terms import script_terms


class Trainer(DecoupledTrainer):
    """Trains a plan: all stages in this process, or under torchrun the one stage of this rank."""

    @script_terms()
    def __init__(
        self,
        plan: Plan,
        *,
        loss: LossChoice = "cross_entropy",
        validate_loss: LossChoice | None = None,
        critic: CriticChoice = "auto",
        critic_target: RuleChoice = "label",
        global_correction: CorrectionChoice = None,
        optimizer: OptimizerChoice = "AdamW",
        schedule: ScheduleChoice = None,
        device: str = "auto",
        seed: int = 0,
        checkpoints: str | Path | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> None:
        """Check everything; stages are built by the first `fit` or `evaluate`.

        Args:
            plan: From `partition`, with a sample.
            loss: A kind ("cross_entropy", "nll", "bce_with_logits", "mse", "l1", "huber", "ctc", ...), a settings
                dictionary like {"kind": "cross_entropy", "label_smoothing": 0.1}, "package.module:function", a module
                of torch, or any loss(output, target) -> scalar (docs/losses.md says how micro-batches weigh).
            validate_loss: Loss of the held-out scores alone; None: the same.
            critic: A kind ("auto", "head", "auglocal", ...), a settings dictionary, one module (copied for every
                stage), a list of modules (one per stage but the last), or a function of a `CriticContext`.
            critic_target: Source that stages and critics learn from: "label", "cascade", "mix" or "delayed", or a
                settings dictionary.
            global_correction: End-to-end steps between local ones, like {"every": 100, "steps": 1}; None: none.
            optimizer: Name in `torch.optim`, a dictionary like {"kind": "AdamW", "lr": 3e-4, "no_decay": True}, or a
                function of the parameters of one stage.
            schedule: Learning-rate schedule: a kind ("cosine", "linear", "plateau", ...), a dictionary like
                {"kind": "cosine", "warmup": 100}, or a function that makes a torch scheduler of an optimizer, called
                once per optimizer and stepped once per optimizer step; None: constant.
            device: "auto", "cpu" or "cuda".
            seed: Seed of critics' weights and dropout; seed your layers' weights yourself, before making them.
            checkpoints: Folder for checkpoints (shared by all ranks), or None.
            observer: Takes the metric records, on rank 0; None: a live view in the terminal.
            **options: The sections `training`, `links`, `validation`, `checkpoint` and `logging` of the settings as
                dictionaries, like training={"clip_norm": 1.0}, or single fields of them: accumulate, clip_norm,
                precision, checkpoint_activations, compile, stagger, critic_warmup; capacity, timeout_seconds; knn,
                knn_samples, validate_every, validation_batches; keep_checkpoints, save_every, refresh_tied; log_every.
                docs/configuration.md describes each one.

        Raises:
            TypeError: There is no such option.
            UsageError: A setting that cannot be; the number of ranks is not the number of stages.
        """
        sections = _sections(options)
        correction = None
        if global_correction is not None:
            correction = choose_section(global_correction, CorrectionSettings, "global_correction")
        recipe = Recipe(
            loss=find_loss(loss),
            critic=choose_critic(critic),
            optimizer=choose_optimizer(optimizer),
            schedule=choose_schedule(schedule),
            target=choose_rule(critic_target),
            correction=correction,
            metrics=sections.pop("logging"),
            held_out_loss=find_loss(validate_loss, "validation.loss") if validate_loss is not None else None,
            seed=choose_value("seed", seed),
            **sections,
        )
        folder = None if checkpoints is None else choose_folder("checkpoints", checkpoints)
        if observer is not None:
            expect_function("observer", observer, 1, "a function of a list of records")
        super().__init__(plan, recipe, device, folder, observer)

    build = script_terms()(DecoupledTrainer.build)
    fit = script_terms()(DecoupledTrainer.fit)
    evaluate = script_terms()(DecoupledTrainer.evaluate)
    export = script_terms()(DecoupledTrainer.export)


def _as_dictionary(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Section):
        return value.model_dump()
    if not isinstance(value, dict):
        raise UsageError(
            f"`{name}` is {shown(value)}; give a dictionary of its fields", code="section-expected", key=name
        )
    return value


_NAMED = ("loss", "critic", "critic_target", "global_correction", "optimizer", "schedule", "device", "checkpoints")
"""Arguments of `Trainer` that are no field of a section, for suggestions."""


def _sections(options: dict[str, Any]) -> dict[str, Any]:
    """Sort options into sections and check each section once."""
    keys = {name: key for key, name in SCRIPT_NAMES.items() if key.split(".")[0] in TRAINER_SECTIONS}
    del keys["steps"]  # `fit` takes it
    given: dict[str, dict[str, Any]] = {key: {} for key in TRAINER_SECTIONS}
    options = {name: value for name, value in options.items() if value is not None}  # None: the default
    for name, value in options.items():
        if name in TRAINER_SECTIONS:
            given[name] |= _as_dictionary(name, value)
    for name, value in options.items():
        if name in TRAINER_SECTIONS:
            continue
        if name not in keys:
            known = [*keys, *TRAINER_SECTIONS, *_NAMED]
            raise TypeError(f"Trainer() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}")
        section, _, field = keys[name].partition(".")
        if field in given[section]:
            raise UsageError(
                f"`{keys[name]}` is given twice, as an option and in {section}; give it once",
                code="given-twice",
                key=keys[name],
            )
        given[section][field] = value
    return {key: choose_section(given[key], kind, key) for key, kind in TRAINER_SECTIONS.items()}
