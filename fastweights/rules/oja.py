"""Rules that act on the rows of W: the transposes of the delta family."""

from __future__ import annotations

from ..language.decorator import outer, rule
from ..language.objective import Objective
from ..language.roles import Key, Rate, Value, ValueLogDecay


def reconstruction_error(W, k, v):
    """1/2 |k - W^T v|^2"""
    return 0.5 * ((k - W.mT @ v) ** 2).sum()


@rule
def value_decay(W, g: ValueLogDecay):
    """Forget, each value channel at its own rate."""
    return (W.mT * g.exp()).mT


@rule(
    objective=Objective("1/2 |k - W^T v|^2", reconstruction_error),
    cite="Oja 1982, J. Math. Biology 15; Irie et al. 2022, NeurIPS",
)
def oja(W, k: Key, v: Value, beta: Rate):
    """Oja's rule for a subspace, the transpose of delta: correct the reconstruction of the key from the value."""
    return W + beta * outer(v, k - W.mT @ v)


@rule(
    objective=Objective("1/2 |k - W^T v|^2 at the decayed W", reconstruction_error, first=value_decay),
    cite="Irie et al. 2022, NeurIPS",
)
def gated_oja(W, k: Key, v: Value, beta: Rate, g: ValueLogDecay):
    """Forget over value channels, then Oja's rule: the transpose of gated_delta."""
    W = (W.mT * g.exp()).mT
    return W + beta * outer(v, k - W.mT @ v)
