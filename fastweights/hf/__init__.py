"""Hugging Face: other people's models on this engine, and this library's as one of transformers' (``pip install 'fastweights[hf]'``).

``enable()`` exchanges the functions that transformers' linear-attention layers call; ``accelerate(model)`` does so for one model.
``FastWeightForCausalLM`` is the language model with ``generate``, ``save_pretrained`` and ``Trainer``; importing this registers it, so that
``AutoModelForCausalLM.from_pretrained`` finds it.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("fastweights.hf needs transformers: pip install 'fastweights[hf]'") from error

from .acceleration import Report, accelerate, disable, enable, restore
from .model import FastWeightCache, FastWeightConfig, FastWeightForCausalLM

__all__ = [
    "FastWeightCache", "FastWeightConfig", "FastWeightForCausalLM", "Report", "accelerate", "disable", "enable", "restore",
]  # fmt: skip
