"""The language model in plain torch, its files, and generation from it."""

from .files import load, save
from .language_model import LanguageModel, ModelConfig
from .stream import Sampler, Stream

__all__ = ["LanguageModel", "ModelConfig", "Sampler", "Stream", "load", "save"]
