"""Error-correcting rules: W is corrected by what it gets wrong, v - W k."""

from __future__ import annotations

from ..language.decorator import outer, rule
from ..language.objective import Objective
from ..language.roles import Gate, Key, KeyGate, KeyState, KeyVector, LogDecay, Query, Rate, Scalar, Value, ValueGate
from .hebb import decay


def half_squared_error(W, k, v):
    """1/2 |v - W k|^2"""
    return 0.5 * ((v - W @ k) ** 2).sum()


@rule
def erase(W, k: Key, beta: Rate):
    """Take away a part of what is stored at a key; the first half of the delta rule."""
    return W - beta * outer(W @ k, k)


@rule(
    objective=Objective("1/2 |v - W k|^2", half_squared_error),
    cite="Widrow and Hoff 1960; Schlag, Irie and Schmidhuber 2021, ICML (DeltaNet)",
)
def delta(W, k: Key, v: Value, beta: Rate):
    """Correct the prediction error at the key: one descent step on 1/2 |v - W k|^2."""
    return W + outer(beta * (v - W @ k), k)


@rule(
    objective=Objective("1/2 |v - W k|^2 at the decayed W", half_squared_error, first=decay),
    cite="Yang, Kautz and Hatamizadeh 2025, ICLR (Gated DeltaNet); Kimi Team 2025 (KDA: one decay per key channel)",
)
def gated_delta(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    """Forget, then correct the prediction error: one descent step on 1/2 |v - W k|^2 after decay."""
    W = W * g.exp()
    return W + outer(beta * (v - W @ k), k)


@rule(
    objective=Objective("|W - W'|^2 + beta |v - W k|^2, minimised", half_squared_error, proximal=True),
    cite="Nagumo and Noda 1967 (NLMS); Liu et al. 2024 (Longhorn)",
)
def implicit_delta(W, k: Key, v: Value, beta: Rate):
    """The implicit delta step: the rate shrinks as the key grows, so that no beta overshoots."""
    return W + outer(beta / (1 + beta * (k @ k)) * (v - W @ k), k)


@rule(cite="Gated DeltaNet-2, 2026")
def erase_write(W, k: Key, v: Value, b: KeyGate, w: ValueGate, g: LogDecay):
    """Forget; erase with a gate b per key channel; write with a gate w per value channel."""
    W = W * g.exp()
    return W - outer(W @ (b * k), k) + outer(w * v, k)


@rule(cite="Hu et al. 2025 (Comba)")
def comba(W, q: Query, k: Key, v: Value, p: KeyVector, beta: Rate, d: Scalar, g: LogDecay):
    """Feed back what the undecayed W predicts at p; the query is corrected by d k."""
    W = W * g.exp() - beta * outer(W @ p, k) + beta * outer(v, k)
    return W, W @ (q - d * k)


@rule(cite="Peng et al. 2025 (RWKV-7)")
def generalised_delta(W, k: Key, v: Value, x: KeyVector, y: KeyVector, g: LogDecay):
    """Diagonal plus any rank-one transition: RWKV-7 has x = -kk, y = kk * eta for a unit key kk."""
    return W * g.exp() + outer(W @ x, y) + outer(v, k)


@rule(cite="arXiv 2604.21100, 2026")
def preconditioned_delta(W, A: KeyState, k: Key, v: Value, beta: Rate, g: LogDecay, a: Gate, b: Gate):
    """Gated delta with a diagonal preconditioner: channels with much past energy A are written with a smaller step."""
    A = a * A + b * k * k
    W = W * g.exp()
    return W + outer(beta * (v - W @ k), k / (1 + A)), A


@rule(cite="Sutton 1988, Machine Learning 3; Dayan 1993, Neural Computation 5 (successor representation)")
def td(W, k: Key, k_next: Key, v: Value, beta: Rate, gamma: Gate):
    """Temporal difference learning (semi-gradient); v is the reward, or the features themselves for successor features."""
    return W + beta * outer(v + gamma * (W @ k_next) - W @ k, k)
