"""Training: one thin loop, a run as a folder, exact resume."""

from .config import TrainConfig
from .loop import Interrupted, train

__all__ = ["Interrupted", "TrainConfig", "train"]
