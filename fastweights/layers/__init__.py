"""Modules: signals in the world of networks. Every layer is ``y, state = layer(x, state)``."""

from .attention import SoftmaxAttention
from .layer import FastWeightLayer
from .programmer import Programmer, ShortConvolution

__all__ = ["FastWeightLayer", "Programmer", "ShortConvolution", "SoftmaxAttention"]
