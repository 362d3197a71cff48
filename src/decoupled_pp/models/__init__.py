"""Networks as lists of layers: built-in ones, any model (`splitting/`), and where to cut them (`cutting/`)."""

from decoupled_pp.models.generation import generate
from decoupled_pp.models.table import KINDS, build_model

__all__ = [
    "KINDS",
    "build_model",
    "generate",
]
