"""Additive rules: what is written does not depend on what W already holds."""

from __future__ import annotations

import functools

import torch

from ..language.decorator import outer, rule
from ..language.objective import Objective
from ..language.roles import Key, KeyState, KeyVector, LogDecay, PositiveKey, PositiveQuery, Query, Rate, Scalar, ScalarState, Value
from ..language.rule import Rule


@rule
def write(W, k: Key, v: Value, beta: Rate):
    """Add a value at a key; the second half of the delta rule."""
    return W + beta * outer(v, k)


@rule
def decay(W, g: LogDecay):
    """Forget: shrink all of W, or each key channel at its own rate."""
    return W * g.exp()


@rule(
    objective=Objective("-v^T W k", lambda W, k, v: -(v @ (W @ k)), rate=1.0),
    cite="Schmidhuber 1992, Neural Computation 4(1); Katharopoulos et al. 2020, ICML; Schlag et al. 2021, ICML",
)
def hebb(W, k: Key, v: Value):
    """Hebb's rule, or linear attention: what fires together wires together."""
    return W + outer(v, k)


@rule(objective=Objective("-v^T W k", lambda W, k, v: -(v @ (W @ k))), cite=hebb.cite)
def hebb_rate(W, k: Key, v: Value, beta: Rate):
    """Hebb's rule with a learning rate."""
    return W + beta * outer(v, k)


@rule(
    objective=Objective(
        "-v^T W k + 1/2 sum_j (1 - a_j) |W_:j|^2",
        lambda W, k, v, g: -(v @ (W @ k)) + 0.5 * ((1 - g.exp()) * W**2).sum(),
        rate=1.0,
    ),
    cite="Sun et al. 2023 (RetNet); Dao and Gu 2024 (Mamba-2); Yang et al. 2024 (GLA); Qin et al. 2024 (HGRN2)",
)
def decayed_hebb(W, k: Key, v: Value, g: LogDecay):
    """Forget, then associate: RetNet, Mamba-2, GLA and HGRN2 with four programmers."""
    return W * g.exp() + outer(v, k)


@rule(cite="Katharopoulos et al. 2020, ICML")
def normalised_hebb(W, z: KeyState, q: PositiveQuery, k: PositiveKey, v: Value):
    """Linear attention: Hebb's rule with the read-out divided by the sum of the weights of attention."""
    W, z = W + outer(v, k), z + k
    return W, z, W @ q / (z @ q)


@rule(
    objective=Objective(
        "-dt v^T W k + 1/2 sum_j (1 - a_j) |W_:j|^2",
        lambda W, k, v, dt, g: -dt * (v @ (W @ k)) + 0.5 * ((1 - g.exp()) * W**2).sum(),
        rate=1.0,
    ),
    cite="Dao and Gu 2024, ICML (Mamba-2, SSD)",
)
def stepped_hebb(W, k: Key, v: Value, dt: Scalar, g: LogDecay):
    """Mamba-2: a step size dt multiplies what is written, and sets the decay, g = -exp(A) dt."""
    return W * g.exp() + outer(dt * v, k)


@functools.lru_cache(maxsize=8)
def mlstm(eps: float = 0.0) -> Rule:
    """``exp_gated_hebb`` with a small number added to what it divides by, as published models have it."""

    @rule(cite="Beck et al. 2024, NeurIPS (xLSTM: mLSTM)")
    def exp_gated_hebb(W, n: KeyState, m: ScalarState, q: Query, k: Key, v: Value, i: Scalar, g: LogDecay):
        """mLSTM: an exponential input gate exp(i), kept finite by a running maximum m, and a normalised read-out."""
        top = torch.maximum(g + m, i)
        f, i = (g + m - top).exp(), (i - top).exp()
        W, n = f * W + outer(i * v, k), f * n + i * k
        below = torch.maximum((n @ q).abs(), (-top).exp())
        return W, n, top, W @ q / (below + eps if eps else below)

    return exp_gated_hebb.made_by(mlstm, eps)


exp_gated_hebb = mlstm()


@rule(cite="Peng et al. 2024 (RWKV-6, Eagle and Finch)")
def bonus_hebb(W, q: Query, k: Key, v: Value, u: KeyVector, g: LogDecay):
    """RWKV-6: the present token is read with a weight u of its own, before it is written."""
    y = (W + outer(v, u * k)) @ q
    return W * g.exp() + outer(v, k), y
