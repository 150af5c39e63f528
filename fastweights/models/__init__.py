"""The language model in plain torch, its files, and generation from it."""

from .files import load, save
from .language_model import LanguageModel, ModelConfig
from .presets import PRESETS, Preset, layer_of
from .stream import Sampler, Stream

__all__ = ["PRESETS", "LanguageModel", "ModelConfig", "Preset", "Sampler", "Stream", "layer_of", "load", "save"]
