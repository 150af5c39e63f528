"""Weights of other people's models and layers in ours, and back."""

from .families import FAMILIES
from .folders import convert, load_theirs
from .layers import layer_from, layer_to
from .table import ConversionError

__all__ = ["FAMILIES", "ConversionError", "convert", "layer_from", "layer_to", "load_theirs"]
