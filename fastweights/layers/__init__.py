"""Modules: signals in the world of networks. Every layer is ``y, state = layer(x, state)``."""

from .attention import SoftmaxAttention
from .continuous import ContinuousLayer
from .deep import DeepLayer
from .descent import deep_scan
from .hybrid import HybridAttention
from .layer import FastWeightLayer
from .least_squares import MesaLayer, mesa
from .programmer import Programmer, ShortConvolution

__all__ = [
    "ContinuousLayer", "DeepLayer", "FastWeightLayer", "HybridAttention", "MesaLayer", "Programmer", "ShortConvolution",
    "SoftmaxAttention", "deep_scan", "mesa",
]  # fmt: skip
