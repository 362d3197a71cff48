"""The simulation against closed forms and hand-drawn timelines; and without torch."""

import subprocess
import sys

import pytest

from decoupled_pp.commands.plan.orders import Operation
from decoupled_pp.commands.plan.simulate import Compute, Link, Message, Post, Send, Wait, simulate
from kit import refused

NUMBERS = Operation("F", 0, 0), Operation("F", 1, 0)


def _one_message(sender, receiver, eager=False, count=1):
    messages = [Message("activation", 0, n, 0, 1, 100, eager) for n in range(count)]
    return [sender(messages), receiver(messages)]


def _times(programs, link, **seconds):
    durations = {"F": 1.0, "B": 2.0, **seconds}
    return simulate(programs, lambda operation: durations[operation.kind], link)


def test_a_message_waits_for_word_of_its_receive():
    """Compute 1 s, send; the receiver posts at 0: bytes 100 / 50, latency 0.25."""
    programs = _one_message(
        lambda m: [Compute(NUMBERS[0]), Send(m[0]), Wait(m[0], "sent")],
        lambda m: [Post(m[0]), Wait(m[0], "received"), Compute(NUMBERS[1])],
    )
    timeline = _times(programs, Link(0.25, 50.0))
    assert timeline.ends == [pytest.approx(1 + 2), pytest.approx(1 + 2 + 0.25 + 1)]
    assert timeline.bytes_sent == {(0, 1, "activation"): 100}


def test_a_late_receive_holds_the_sender_and_an_eager_message_does_not_care():
    def sender(m):
        return [Send(m[0]), Wait(m[0], "sent")]

    def receiver(m):
        return [Compute(NUMBERS[1]), Post(m[0]), Wait(m[0], "received")]

    late = _times(_one_message(sender, receiver), Link(0.25, 50.0))
    assert late.ends == [pytest.approx(1 + 0.25 + 2), pytest.approx(1 + 0.25 + 2 + 0.25)]
    eager = _times(_one_message(sender, receiver, eager=True), Link(0.25, 50.0))
    assert eager.ends == [pytest.approx(2), pytest.approx(2 + 0.25)]


def test_messages_of_one_direction_share_the_bandwidth():
    programs = _one_message(
        lambda m: [Send(m[0]), Send(m[1])],
        lambda m: [Wait(m[1], "received")],
        eager=True,
        count=2,
    )
    assert _times(programs, Link(0.25, 50.0)).ends[1] == pytest.approx(4.25)


def test_the_host_is_busy_with_each_send_and_receive():
    programs = _one_message(
        lambda m: [Send(m[0]), Compute(NUMBERS[0])],
        lambda m: [Post(m[0]), Wait(m[0], "received"), Compute(NUMBERS[1])],
    )
    assert _times(programs, Link(host=0.1)).ends == [pytest.approx(1.1), pytest.approx(1.1)]


def test_programs_that_wait_for_ever_are_refused():
    programs = _one_message(lambda m: [], lambda m: [Post(m[0]), Wait(m[0], "received")])
    with pytest.raises(ValueError, match="never end: rank 1 waits at"):
        _times(programs, Link())


@pytest.mark.parametrize("link", [{"latency": -1.0}, {"bandwidth": 0.0}, {"latency": float("inf")}, {"host": -1.0}])
def test_no_link_is_like_that(link):
    with refused("option-out-of-range"):
        Link(**link)


def test_nothing_of_the_simulation_imports_torch():
    modules = ["orders", "programs", "simulate", "costs", "predict", "transformer", "scaling", "command"]
    script = "import sys\n" + "".join(f"import decoupled_pp.commands.plan.{name}\n" for name in modules)
    script += "assert not {'torch', 'numpy', 'random'} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
