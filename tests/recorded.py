"""Records as a stage posts them and reports as a run ends with them, with numbers that are easy to reckon with."""

from decoupled_pp.core.reports import Exit, FinalScores, Report, StageSummary, TrainRecord, ValidationRecord

PHASES = {"wait_in": 1.0, "forward": 1.0, "wait_out": 0.0, "critic": 0.5, "backward": 2.0, "step": 0.1}


def train_record(step, stage=0, **changes):
    """Returns what a stage posts after optimizer step `step`, of one packet of 8 samples each."""
    fields = {
        "packet": step, "step": step, "samples": 8 * step, "loss": 1.5, "samples_per_second": 100.0,
        "busy_fraction": 0.75, "queue": 2, "lr": 0.001, "seconds": 0.1 * step, "training_seconds": 0.1 * step,
    }  # fmt: skip
    return TrainRecord(stage=stage, **fields | changes)


def validation_record(step, stage=0, **changes):
    """Returns what a stage posts of an evaluation after optimizer step `step`."""
    fields = {"samples": 8 * step, "loss": 2.5, "accuracy": 0.5, "seconds": 1.0, "training_seconds": 1.0}
    return ValidationRecord(stage=stage, step=step, **fields | changes)


def stage_summary(**changes):
    """Returns one row of `per_stage`."""
    row = {
        "stage": 0, "parameters": 100, "critic_parameters": 0, "saved_activation_bytes_peak": 1000,
        "memory_bytes_peak": 5000, "critic_time_fraction": 0.0, "busy_fraction": 0.5, "wait_in_seconds": 1.0,
        "wait_out_seconds": 0.0, "phase_seconds": PHASES,
    }  # fmt: skip
    return StageSummary(**row | changes)


def report(loss, accuracy=None, **changes):
    """Returns the report of a run whose only exit ended with this held-out loss."""
    fields = {
        "steps": 10, "seconds": 2.0, "training_seconds": 2.0, "step_seconds": None, "samples_per_second": 100.0,
        "per_stage": (stage_summary(), stage_summary()), "links": (),
    }  # fmt: skip
    final = FinalScores(None, loss, accuracy)
    return Report(final=final, exits=(Exit(0, loss, accuracy),), **fields | changes)
