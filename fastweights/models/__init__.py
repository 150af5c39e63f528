"""The language model in plain torch, its files, and generation from it."""

from .files import load, save
from .language_model import LanguageModel, ModelConfig
from .presets import PRESETS, Preset, layer_of
from .sequence_model import SequenceModel
from .stream import Sampler, Stream
from .systems import SYSTEMS, System

__all__ = [
    "PRESETS", "SYSTEMS", "LanguageModel", "ModelConfig", "Preset", "Sampler", "SequenceModel", "Stream", "System", "layer_of", "load",
    "save",
]  # fmt: skip
