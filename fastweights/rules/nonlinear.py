"""Rules that are not affine in W: bounded, squashed and binary weights, a sliding threshold, other objectives than a squared error."""

from __future__ import annotations

import torch

from ..language.decorator import descend, outer, rule
from ..language.objective import Objective
from ..language.roles import Gate, Key, LogDecay, Rate, Scalar, Value, ValueState


@rule(cite="Bienenstock, Cooper and Munro 1982, J. Neuroscience 2; Intrator and Cooper 1992")
def bcm(W, theta: ValueState, k: Key, beta: Rate, a: Gate):
    """A sliding threshold: weak activity depresses, strong activity potentiates, and the threshold follows the activity squared."""
    y = W @ k
    theta = a * theta + (1 - a) * y * y
    return W + beta * outer(y * (y - theta), k), theta


@rule(cite="Hopfield 1982; Parisi 1986, J. Phys. A 19; Fusi and Abbott 2007, Nature Neuroscience 10")
def clip(W, k: Key, v: Value, bound: Scalar):
    """Hebb's rule for synapses that are bounded: what is beyond -bound or bound is cut off."""
    return torch.maximum(torch.minimum(W + outer(v, k), bound), -bound)


@rule(cite="Schmidhuber 1992, Neural Computation 4(1); Ba et al. 2016")
def tanh(W, k: Key, v: Value, g: LogDecay):
    """Hebb's rule for synapses that saturate softly."""
    return torch.tanh(W * g.exp() + outer(v, k))


@rule(cite="Willshaw, Buneman and Longuet-Higgins 1969, Nature 222")
def willshaw(W, k: Key, v: Value):
    """Binary synapses, keys and values: a synapse is on once both of its sides have been active together (OR)."""
    return torch.maximum(W, outer(v, k))


def huber_loss(W, k, v):
    """sum_i of 1/2 e_i^2, or |e_i| - 1/2 where |e_i| > 1, e = v - W k"""
    e = (v - W @ k).abs()
    inside = torch.minimum(e, 1 + 0 * e)
    return (inside * (e - inside / 2)).sum()


def cubic_loss(W, k, v):
    """1/3 sum_i |v - W k|_i^3"""
    return ((v - W @ k).abs() ** 3).sum() / 3


def negative_cosine(W, k, v):
    """-v^T W k / (|v| |W k|)"""
    y = W @ k
    return -(v @ y) / ((v @ v).sqrt() * (y @ y + 1e-6).sqrt() + 1e-6)


def cross_entropy(W, k, v):
    """log sum_i exp(W k)_i - v^T W k, for a v that adds up to 1"""
    y = W @ k
    return torch.logsumexp(y, -1) - v @ y


@rule(
    objective=Objective("sum_i of 1/2 e_i^2, or |e_i| - 1/2 where |e_i| > 1, e = v - W k", huber_loss),
    cite="Behrouz et al. 2025 (Miras: Yaad)",
)
def huber(W, k: Key, v: Value, beta: Rate):
    """The delta rule with errors that count for at most 1: outliers do not shake it."""
    return W + outer(beta * torch.clamp(v - W @ k, -1, 1), k)


lp = descend(cubic_loss, name="lp", cite="Behrouz et al. 2025 (Miras: Moneta, L_p with p = 3)")
cosine = descend(negative_cosine, name="cosine", cite="Behrouz et al. 2025 (Miras)")


@rule(objective=Objective("log sum exp(W k) - v^T W k", cross_entropy), cite="Behrouz et al. 2025 (Miras)")
def softmax_delta(W, k: Key, v: Value, beta: Rate):
    """The delta rule of a classifier: W k are the logits of a distribution that is to be v."""
    return W + outer(beta * (v - torch.softmax(W @ k, -1)), k)
