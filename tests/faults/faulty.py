"""User code with faults, named by the settings of the tests (`faulty:function`), in this process and in ranks."""

import os
import resource
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from kit import Points, points


class Mislabelled(Points):
    """As many classes as the network has, and one more."""

    def batches(self, start=0):
        return ((images, target + 1) for images, target in super().batches(start))


def mislabelled(settings, seed):
    return replace(points(settings, seed), validation=Mislabelled(settings.batch_size, 2))


def nothing_held_out(settings, seed):
    return replace(points(settings, seed), validation=Points(settings.batch_size, 0))


class Tripwire(nn.Module):
    """Passes its input on; in training packet `at` of this process it does something first."""

    def __init__(self, at, act):
        super().__init__()
        self.at, self.act, self.packets = at, act, 0

    def forward(self, x):
        if self.training:
            self.packets += 1
            if self.packets - 1 == self.at or self.at is None:
                return self.act(x)
        return x


def network(info, extra=None, behind=2):
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, info.outputs)]
    return layers if extra is None else [*layers[:behind], extra, *layers[behind:]]


def not_finite(info, at, value, behind=2):
    return network(info, Tripwire(at, lambda x: x * float(value)), behind)


def raises(info, at, behind=2):
    def divide(x):
        return x * (1 / 0)

    return network(info, Tripwire(at, divide), behind)


def exits(info, at, behind=2):
    def leave(x):
        sys.exit(0)

    return network(info, Tripwire(at, leave), behind)


class Unprintable(Exception):
    def __str__(self):
        raise AttributeError("no such thing")


def unprintable(info, at, behind=2):
    def fail(x):
        raise Unprintable

    return network(info, Tripwire(at, fail), behind)


def fills_the_disk(info, at, behind=2):
    """From then on no file of this process may grow beyond a kilobyte."""

    def fill(x):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return x

    return network(info, Tripwire(at, fill), behind)


def infinite_gradient(info, at, behind=2):
    def watch(x):
        x.register_hook(lambda gradient: gradient * float("inf"))
        return x

    return network(info, Tripwire(at, watch), behind)


def slow(info, seconds, behind=2):
    """Sleeps in every packet; without an effect on the values, or on anything once the file `hurry` exists."""

    def rest(x):
        if not Path("hurry").exists():
            time.sleep(seconds)
        return x

    return network(info, Tripwire(None, rest), behind)


def dies_once(info, at, number, behind=2):
    """Sends its own process a signal, in one process of all that ever run in this working directory."""

    def die(x):
        with suppress(FileExistsError):
            Path("died").touch(exist_ok=False)  # one system call: two ranks may come here at the same moment
            os.kill(os.getpid(), number)
        return x

    return network(info, Tripwire(at, die), behind)


def misfit(info):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(8, info.outputs))


def returns_dictionary(info):
    class Strange(nn.Module):
        def forward(self, x):
            return {"x": x}

    return [nn.Flatten(), Strange(), nn.Linear(64, info.outputs)]


def no_layers(info):
    return 3


def critic_of_3_classes(context):
    return nn.Linear(context.hidden.shape[-1], 3)


def critic_for_7_inputs(context):
    return nn.Linear(7, context.output.shape[-1])


def critic_of_stage_0_only(context):
    return nn.Linear(context.hidden.shape[-1] + context.stage, context.output.shape[-1])


def no_scalar(logits, target):
    return logits
