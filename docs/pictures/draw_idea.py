"""Draws docs/pictures/idea.svg: stages with critics and one-way links, and their timeline beside 1F1B's.

python docs/pictures/draw_idea.py > docs/pictures/idea.svg     # or: make pictures

Plain Python. Both timelines are simulated, not drawn by hand: three stages of equal length, a backward pass as long as
two forward passes, a critic that costs a quarter of a forward pass, links that take no time, four micro-batches per
flush.
"""

import sys
from dataclasses import dataclass

STAGES = 3
MICRO_BATCHES = 4  # per flush of 1F1B
FORWARD = 1.0
CRITIC = 0.25
BACKWARD = 2.0
UNTIL = 36.0  # two flushes of 1F1B

WIDTH = 1000
HEIGHT = 500
LEFT = 92  # where time begins
UNIT = (WIDTH - LEFT - 28) / UNTIL
ROW = 27
GAP = 4

# The card brings its own background: a page and the reader's system may disagree on dark mode.
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de; }
    text { fill: #1f2328; font: 14px -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
    .title { font-size: 16px; font-weight: 600; }
    .quiet { fill: #59636e; }
    .number { font-size: 12.5px; text-anchor: middle; }
    .middle { text-anchor: middle; }
    .end { text-anchor: end; }
    .stage { fill: #dbeafe; stroke: #2563eb; }
    .critic { fill: #fed7aa; stroke: #c2410c; }
    .forward { fill: #93c5fd; }
    .backward { fill: #86dfae; }
    .loss { fill: #f59e5b; }
    .track { fill: #eef1f4; }
    .idle { fill: url(#hatch); }
    .hatch { stroke: #b4bcc6; }
    .arrow { stroke: #2563eb; fill: none; stroke-width: 2.2; }
    .head { fill: #2563eb; }
    .learn { stroke: #c2410c; fill: none; stroke-width: 1.8; }
    .learn-head { fill: #c2410c; }
    .line { stroke: #d0d7de; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d; }
      text { fill: #e6edf3; }
      .quiet { fill: #9aa4af; }
      .stage { fill: #14315f; stroke: #6aa5f8; }
      .critic { fill: #57290f; stroke: #f59e5b; }
      .forward { fill: #2456a6; }
      .backward { fill: #1c6b42; }
      .loss { fill: #c4601a; }
      .track { fill: #171d25; }
      .hatch { stroke: #4a535e; }
      .arrow { stroke: #6aa5f8; }
      .head { fill: #6aa5f8; }
      .learn { stroke: #f59e5b; }
      .learn-head { fill: #f59e5b; }
      .line { stroke: #3d444d; }
    }
"""


@dataclass(frozen=True)
class Pass:
    """One span of compute of one stage."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


def decoupled() -> list[Pass]:
    """Returns the passes of decoupled stages: a stage waits for its packet only."""
    passes = []
    free = [0.0] * STAGES
    number = 0
    while free[0] < UNTIL:
        arrival = 0.0
        for stage in range(STAGES):
            start = max(free[stage], arrival)
            arrival = start + FORWARD
            judged = arrival + CRITIC
            free[stage] = judged + BACKWARD
            passes.append(Pass(stage, "forward", number, start, arrival))
            passes.append(Pass(stage, "loss", number, arrival, judged))
            passes.append(Pass(stage, "backward", number, judged, free[stage]))
        number += 1
    return passes


def one_forward_one_backward() -> list[Pass]:
    """Returns the passes of 1F1B: a backward pass waits for the next stage's, a flush for all of them."""
    passes = []
    free = [0.0] * STAGES
    ends: dict[tuple[str, int, int], float] = {}
    for flush in range(int(UNTIL / (MICRO_BATCHES * (FORWARD + BACKWARD))) + 1):
        orders = [_order(stage, flush * MICRO_BATCHES) for stage in range(STAGES)]
        while any(orders):
            for stage in range(STAGES):
                while orders[stage] and _needs(stage, *orders[stage][0]) in [*ends, None]:
                    kind, number = orders[stage].pop(0)
                    ready = ends.get(_needs(stage, kind, number), 0.0)
                    start = max(free[stage], ready)
                    free[stage] = start + (FORWARD if kind == "forward" else BACKWARD)
                    ends[kind, stage, number] = free[stage]
                    passes.append(Pass(stage, kind, number, start, free[stage]))
    return passes


def _order(stage: int, first: int) -> list[tuple[str, int]]:
    """Returns what a stage computes in one flush: some forward passes ahead, then one forward, one backward."""
    ahead = STAGES - 1 - stage
    order = [("forward", first + i) for i in range(ahead)]
    for i in range(MICRO_BATCHES):
        if i + ahead < MICRO_BATCHES:
            order.append(("forward", first + i + ahead))
        order.append(("backward", first + i))
    return order


def _needs(stage: int, kind: str, number: int) -> tuple[str, int, int] | None:
    """Returns the pass of a neighbour that must end first, or None."""
    if kind == "forward":
        return None if stage == 0 else ("forward", stage - 1, number)
    return None if stage == STAGES - 1 else ("backward", stage + 1, number)


def idle_share(passes: list[Pass]) -> float:
    """Returns the share of all stages' time until `UNTIL` without compute."""
    busy = sum(min(one.end, UNTIL) - one.start for one in passes if one.start < UNTIL)
    return 1 - busy / (STAGES * UNTIL)


def rectangle(x: float, y: float, width: float, height: float, kind: str, *, radius: float = 3) -> str:
    """Returns a rectangle with round corners."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"/>'


def words(x: float, y: float, text: str, kind: str = "") -> str:
    """Returns a line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "arrow") -> str:
    """Returns an arrow; its marker belongs to its kind."""
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" marker-end="url(#{kind}-head)"/>'


def draw_stages(top: float) -> list[str]:
    """Returns the upper part: the feed, the stages, their critics, the links."""
    box, height, step, first = 176, 50, 312, 172
    stage_top = top + 66
    middle = stage_top + height / 2
    parts = [words(28, middle - 4, "micro-", "quiet"), words(28, middle + 13, "batches", "quiet")]
    parts.append(arrow(LEFT - 8, middle, first - 10, middle))
    for stage in range(STAGES):
        x = first + stage * step
        centre = x + box / 2
        name = "critic" if stage < STAGES - 1 else "own head"
        parts.append(rectangle(centre - 52, top, 104, 32, "critic", radius=16))
        parts.append(words(centre, top + 21, name, "middle"))
        parts.append(arrow(centre - 16, stage_top - 2, centre - 16, top + 38))
        parts.append(arrow(centre + 16, top + 34, centre + 16, stage_top - 7, "learn"))
        parts.append(words(centre + 26, top + 54, "gradient", "quiet"))
        parts.append(rectangle(x, stage_top, box, height, "stage", radius=8))
        parts.append(words(centre, middle - 2, f"stage {stage}", "middle title"))
        parts.append(words(centre, middle + 16, "layers, optimizer", "middle quiet"))
        if stage < STAGES - 1:
            parts.append(arrow(x + box + 6, middle, x + step - 10, middle))
            parts.append(words(x + (box + step) / 2, middle - 10, "activations", "middle"))
            parts.append(words(x + (box + step) / 2, middle + 22, "nothing back", "middle quiet"))
    return parts


def draw_timeline(top: float, passes: list[Pass]) -> list[str]:
    """Returns one row per stage; what the track shows through is idle."""
    parts = []
    for stage in range(STAGES):
        y = top + stage * (ROW + GAP)
        parts.append(words(LEFT - 10, y + 18, f"stage {stage}", "end quiet"))
        parts.append(rectangle(LEFT, y, UNTIL * UNIT, ROW, "track"))
        parts.append(rectangle(LEFT, y, UNTIL * UNIT, ROW, "idle"))
    for one in passes:
        if one.start >= UNTIL:
            continue
        y = top + one.stage * (ROW + GAP)
        x = LEFT + one.start * UNIT
        width = (min(one.end, UNTIL) - one.start) * UNIT
        parts.append(rectangle(x + 0.5, y, width - 1, ROW, one.kind, radius=2))
        if one.kind != "loss" and width > 16:
            parts.append(words(x + width / 2, y + 18, str(one.micro_batch), "number"))
    return parts


def draw_legend(y: float) -> list[str]:
    """Returns the key of both timelines."""
    parts = []
    x = float(LEFT)
    entries = [("forward", "forward"), ("loss", "critic"), ("backward", "backward"), ("idle", "idle")]
    for kind, text in entries:
        parts.append(rectangle(x, y - 12, 24, 15, "track" if kind == "idle" else kind, radius=2))
        if kind == "idle":
            parts.append(rectangle(x, y - 12, 24, 15, kind, radius=2))
        parts.append(words(x + 31, y, text, "quiet"))
        x += 31 + 7.2 * len(text) + 22
    parts.append(words(WIDTH - 28, y, "numbers: micro-batches; time runs to the right", "end quiet"))
    return parts


def picture() -> str:
    """Returns the whole SVG."""
    ours = decoupled()
    theirs = one_forward_one_backward()
    ours_title = "Decoupled: a stage waits for its next packet only, and updates after each"
    theirs_title = (
        f"1F1B, {MICRO_BATCHES} micro-batches per update: gradients come back, and {100 * idle_share(theirs):.0f} % "
        "of the time is bubble"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Decoupled stages with local critics, and their timeline beside 1F1B's</title>",
        f"<style>{STYLE}</style>",
        "<defs>",
        '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">',
        '<path class="hatch" d="M0 0 V7" stroke-width="2"/></pattern>',
        _marker("arrow-head", "head"),
        _marker("learn-head", "learn-head"),
        "</defs>",
        rectangle(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", radius=12),
        *draw_stages(24),
        '<path class="line" d="M28 163 H972"/>',
        words(LEFT, 190, ours_title, "title"),
        *draw_timeline(202, ours),
        words(LEFT, 330, theirs_title, "title"),
        *draw_timeline(342, theirs),
        *draw_legend(473),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _marker(name: str, kind: str) -> str:
    """Returns an arrow's head."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="9" markerHeight="9" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="{kind}" d="M0 0 L8 4 L0 8 Z"/></marker>'
    )


if __name__ == "__main__":
    sys.stdout.write(picture())
