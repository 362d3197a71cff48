"""Holds the table of training rules. A new rule is a file beside this one, and a row here."""

from __future__ import annotations

from decoupled_pp.pipeline.rules.cascade import Cascade
from decoupled_pp.pipeline.rules.delayed import Delayed
from decoupled_pp.pipeline.rules.end_to_end import EndToEnd
from decoupled_pp.pipeline.rules.local import Local
from decoupled_pp.pipeline.rules.rule import Rule, RuleParts
from decoupled_pp.settings.rules import CorrectionSettings, RuleSettings

RULES: dict[str, type[Rule]] = {"label": Local, "cascade": Cascade, "mix": Cascade, "delayed": Delayed}
"""`critic_target.kind` -> its rule."""


def build_rule(parts: RuleParts, target: RuleSettings, correction: CorrectionSettings | None = None) -> Rule:
    """Build the rule of one stage, chosen by its section, with end-to-end steps between its own if asked for."""
    rule = RULES[target.kind](parts, target)
    return rule if correction is None else EndToEnd(rule, correction)
