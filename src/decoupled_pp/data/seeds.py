"""Derives independent random streams from one seed: one well-mixed generator per (seed, purpose, number)."""

from __future__ import annotations

from enum import IntEnum

import torch

_MASK = 2**64 - 1


class Purpose(IntEnum):
    """Purpose of a random stream; streams of different purposes never share their numbers."""

    SPLIT = 0
    ORDER = 1
    OFFSET = 2
    AUGMENTATION = 3
    HELD_OUT = 4


def mixed_seed(seed: int, purpose: Purpose, number: int = 0) -> int:
    """Return a 63-bit seed in which every bit depends on all arguments.

    Plain sums such as `seed + epoch` would make epoch 1 of seed 0 equal to epoch 0 of seed 1, and torch's Mersenne
    twister looks at the low 32 bits only. The mixing step is SplitMix64 (Steele et al. 2014, OOPSLA).
    """
    state = 0
    for part in (seed, int(purpose), number):
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(seed: int, purpose: Purpose, number: int = 0) -> torch.Generator:
    """Return a new CPU generator for (seed, purpose, number); the global generator is never touched."""
    return torch.Generator().manual_seed(mixed_seed(seed, purpose, number))
