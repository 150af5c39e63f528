"""Rules with several matrices: momentum, eligibility, cascades. They run as recurrences, since the matrices move each other."""

from __future__ import annotations

from typing import Annotated

import torch

from ..language.decorator import outer, rule
from ..language.roles import Gate, Key, KeyMatrix, LogDecay, Matrix, Rate, Scalar, Value, several


@rule(cite="Behrouz, Zhong and Mirrokni 2025 (Titans, linear); Polyak 1964")
def momentum(W, M: Matrix, k: Key, v: Value, beta: Rate, eta: Rate, mu: Gate, g: LogDecay):
    """The delta rule with momentum and forgetting: M gathers errors, and W follows it."""
    M = mu * M + eta * outer(W @ k - v, k)
    return g.exp() * W - beta * M, M


@rule(cite="Barto, Sutton and Anderson 1983; Fremaux and Gerstner 2016, Front. Neural Circuits 9")
def eligibility(W, E: Matrix, k: Key, v: Value, r: Scalar, g: LogDecay):
    """Three factors: pre and post leave an eligibility E, which decays, and a reward r turns what is left of it into weight.

    E is read after the token's own write: a reward in the same step has the whole credit.
    """
    E = g.exp() * E + outer(v, k)
    return W + r * E, E


@rule(cite="Benna and Fusi 2016, Nature Neuroscience 19")
def cascade(W, U: Annotated[Matrix, several(3)], k: Key, v: Value, dt: Rate):
    """Each weight heads a chain of slower and slower copies: C_i du_i/dt = g_{i-1} (u_{i-1} - u_i) - g_i (u_i - u_{i+1}).

    C_i = 2^(i-1), g_i = 2^-(i+2), and nothing behind the last; a step of Euler of length dt, then the write to the first.
    """
    u = [W, U[0], U[1], U[2], 0 * W]
    flow = [2.0 ** -(i + 3) * (u[i] - u[i + 1]) for i in range(4)]
    new = [u[i] + dt * 2.0**-i * (flow[i - 1] - flow[i] if i else -flow[i]) for i in range(4)]
    return new[0] + outer(v, k), torch.stack(new[1:])


@rule(cite="Kalman 1960; Haykin, Adaptive Filter Theory; von Oswald et al. 2023 (Mesa)")
def rls(W, D: KeyMatrix, k: Key, v: Value, g: LogDecay, r: Rate):
    """Recursive least squares, the Kalman filter of a linear map: W + (v - W k) K^T with the gain K = P k / (r + k^T P k).

    P = I + D is the covariance of a row of W, from I; then P - K k^T P. With g = 0 and one noise r, W is the ridge regression of all
    values on all keys with penalty r. A past that fades, P exp(-g), does so until the mean variance is 1,000 times the first.
    """
    eye = torch.diag(0 * k + 1)
    P = eye + D
    P = P * torch.minimum((-g).exp(), torch.maximum(1000 / P.diagonal().mean(), 1 + 0 * g))
    P = (P + P.mT) / 2  # what rounding leaves of an asymmetry would grow as the past fades
    P_k = P @ k
    gain = P_k / (r + (k @ P_k).clamp(min=1e-12))
    return W + outer(v - W @ k, gain), P - outer(gain, P_k) - eye
