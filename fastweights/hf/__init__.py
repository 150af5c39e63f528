"""Hugging Face: other people's models on this engine (``pip install 'fastweights[hf]'``).

``fastweights.hf.enable()`` exchanges the functions that transformers' linear-attention layers call; ``accelerate(model)`` does so for
one model.
"""

from .acceleration import Report, accelerate, disable, enable, restore

__all__ = ["Report", "accelerate", "disable", "enable", "restore"]
