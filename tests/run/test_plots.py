"""The figures: they decode, show what they say, and leave matplotlib's global state alone."""

import math

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from decoupled_pp.core.reports import CheckpointRecord, Span
from decoupled_pp.run import plots
from recorded import train_record, validation_record

SECONDS = {"wait_in": 0.0002, "forward": 0.001, "wait_out": 0.0002, "critic": 0.0006, "backward": 0.002, "step": 0.001}
PERIOD = sum(SECONDS.values())


def timeline(stages, packets=40, lag=1.5):
    spans = {}
    for stage in range(stages):
        clock, spans[stage] = 1_790_000_000.0 + stage * lag * PERIOD, []
        for packet in range(packets):
            for phase, seconds in SECONDS.items():
                spans[stage].append(Span(phase, clock, seconds, 100 + packet))
                clock += seconds
    return spans


def losses(stages, points=10, last=1.0):
    records = []
    for point in range(points):
        for stage in range(stages):
            loss = last + 3 * math.exp(-point / 3) - 0.1 * stage
            records += [train_record(point, stage, loss=loss), CheckpointRecord(stage=stage, step=point)]
            if point % 3 == 2:
                records.append(validation_record(point, stage, loss=loss + 0.1))
    return records


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved."""
    axes = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (axes.extend(self.axes), save(self, *a, **k)))
    return axes


def colours(path):
    pixels = image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 1000
    red, green, blue = (np.rint(pixels[..., channel] * 255).astype(int) for channel in range(3))
    return set(np.unique(red << 16 | green << 8 | blue).tolist())


def rgb(colour):
    return int(matplotlib.colors.to_hex(colour)[1:], 16)


@pytest.mark.parametrize("stages", [1, 2, 8])
def test_timeline_shows_every_phase_of_a_shared_window(tmp_path, drawn, stages):
    path = tmp_path / "new" / "timeline.png"
    plots.plot_timeline(timeline(stages), path)
    seen = colours(path)
    assert {rgb(plots.LOOKS[phase].face) for phase in ("forward", "critic", "backward", "step")} <= seen
    (axes,) = drawn
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"stage {stage}\n92% working" for stage in range(stages)]
    left, right = axes.get_xlim()
    assert left == 0
    assert 8 <= (right - left) / (1e3 * PERIOD) <= 10
    numbers = [int(text.get_text()) for text in axes.texts]
    assert len(numbers) >= 8 * stages
    # The middle of what stage 0 and the last stage share: packets of stage 0 in the window are late in its recording.
    assert min(numbers[:8]) >= 100 + 15
    assert all(0 <= x <= right for collection in axes.collections for box in collection.get_paths()
               for x in box.vertices[:, 0])  # fmt: skip


def test_numbers_that_do_not_fit_are_left_out(tmp_path, drawn):
    short = [span._replace(seconds=0.02 * span.seconds) if span.phase == "forward" else span for span in timeline(1)[0]]
    spans = {0: short}
    plots.plot_timeline(spans, tmp_path / "timeline.png")
    assert not drawn[0].texts


def test_stages_that_share_no_time_are_drawn_whole(tmp_path, drawn):
    plots.plot_timeline(timeline(2, packets=3, lag=5), tmp_path / "timeline.png")
    assert drawn[0].get_xlim()[1] == pytest.approx(8e3 * PERIOD, rel=1e-3)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_losses_have_the_raw_curves_of_every_exit(tmp_path, drawn, stages):
    path = tmp_path / "losses.png"
    records = losses(stages)
    plots.plot_losses(records, path, "nats/token")
    assert {rgb(plots._colour(stage, stages)) for stage in range(stages)} <= colours(path)
    (axes,) = drawn
    assert axes.get_ylabel() == "loss (nats/token)"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    roles = ["critic"] * (stages - 1) + ["network's own head"]
    assert len(legend) == stages
    for stage, (text, role) in enumerate(zip(legend, roles, strict=True)):
        last = [r.loss for r in records if r.kind == "validation" and r.stage == stage][-1]
        assert text == f"exit {stage} ({role}), last held-out {last:#.4g}"
        train, held_out = axes.lines[2 * stage : 2 * stage + 2]
        for line, kind in ((train, "train"), (held_out, "validation")):
            expected = [(r.samples, r.loss) for r in records if r.kind == kind and r.stage == stage]
            assert [tuple(point) for point in line.get_xydata()] == expected
        assert train.get_linewidth() < held_out.get_linewidth()


def test_losses_over_orders_of_magnitude_use_a_log_scale_and_say_so(tmp_path, drawn):
    plots.plot_losses(losses(1, points=20, last=0.01), tmp_path / "losses.png", "nats")
    assert drawn[0].get_yscale() == "log"
    assert drawn[0].get_ylabel() == "loss (nats, log scale)"


def test_missing_and_non_finite_losses_are_left_out(tmp_path, drawn):
    broken = [train_record(1, loss=loss) for loss in (None, math.nan, math.inf)]
    plots.plot_losses(losses(1) + broken, tmp_path / "losses.png", "nats")
    assert len(drawn[0].lines[0].get_xydata()) == 10


def test_a_run_without_records_says_so(tmp_path, drawn):
    plots.plot_losses([], tmp_path / "losses.png", "nats")
    plots.plot_timeline({0: []}, tmp_path / "timeline.png")
    assert [axes.texts[0].get_text() for axes in drawn] == ["no losses recorded", "no spans recorded"]


def test_global_state_of_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.plot_timeline(timeline(2), tmp_path / "timeline.png")
    plots.plot_losses(losses(2), tmp_path / "losses.png", "nats")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs  # what pyplot would keep alive
