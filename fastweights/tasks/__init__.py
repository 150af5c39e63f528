"""What a model is trained on: text, and diagnostic tasks whose examples are a function of (seed, index)."""

from .recall import Recall
from .source import Source
from .text import Text, read_text, standard_library

__all__ = ["Recall", "Source", "Text", "read_text", "standard_library"]
