"""Programmers that see their own past: rules whose writes depend on what was read before, so that time cannot be taken apart.

Slow weights that belong to a head (``Slow...``) are signals that are the same at every token. A matrix that is trained and rewritten,
such as SRWM's, is a slow W_0 and a state that holds the shift from it, so that the empty state is the trained matrix.
"""

from __future__ import annotations

from typing import Annotated

import torch

from ..language.decorator import outer, rule
from ..language.roles import (
    Key,
    KeyMatrix,
    KeyState,
    KeyVector,
    LogDecay,
    Matrix,
    Query,
    Rate,
    Scalar,
    SlowKey,
    SlowKeyMatrix,
    SlowMatrix,
    SlowScalar,
    SlowValue,
    SlowValueMatrix,
    Value,
    ValueCube,
    ValueMatrix,
    ValueState,
    ValueVector,
    several,
)
from .delta import delta


def softmax(x):
    return torch.softmax(x, -1)


def correct(W, k, v, beta):
    """The delta rule, of the catalogue."""
    return delta(W, k, v, beta)


# ---- recurrent fast weights: Irie, Schlag, Csordas and Schmidhuber 2021 ------------------------------------------------------------------

# three of each, one a gate
Matrices = Annotated[Matrix, several(3)]
ValueMatrices = Annotated[ValueMatrix, several(3)]
Keys = Annotated[Key, several(3)]
Values = Annotated[Value, several(3)]
Rates = Annotated[Rate, several(3)]

_IRIE = "Irie, Schlag, Csordas and Schmidhuber 2021, NeurIPS (Going beyond linear transformers with recurrent fast weight programmers)"


@rule(cite=_IRIE)
def delta_rnn(
    W, R: ValueMatrix, y: ValueState, q: Query, k: Key, v: Value, beta: Rate, k_r: Value, v_r: Value, beta_r: Rate
):  # fmt: skip
    """A recurrent network whose two matrices are fast: y = W q + R softmax(y before), W and R by the delta rule."""
    W, R = correct(W, k, v, beta), correct(R, softmax(k_r), v_r, beta_r)
    new = W @ q + R @ softmax(y)
    return W, R, new, new


@rule(cite=_IRIE)
def delta_mlp(W, U: ValueMatrix, q: Query, k: Key, v: Value, beta: Rate, k_u: Value, v_u: Value, beta_u: Rate):
    """A fast network of two layers: y = U softmax(W q), both by the delta rule."""
    W, U = correct(W, k, v, beta), correct(U, softmax(k_u), v_u, beta_u)
    return W, U, U @ softmax(W @ q)


@rule(cite=_IRIE)
def delta_delta(
    W, U_q: KeyMatrix, U_k: KeyMatrix, U_v: Matrix, q: Query, k: Key, v: Value, beta: Rate,
    x: Key, u_q: Key, u_k: Key, u_v: Value, beta_u: Rate,
):  # fmt: skip
    """A DeltaNet whose programmer is fast too: matrices U, rewritten by the delta rule, add what they read of x to query, key and value."""
    x = softmax(x)
    U_q, U_k, U_v = correct(U_q, x, u_q, beta_u), correct(U_k, x, u_k, beta_u), correct(U_v, x, u_v, beta_u)
    W = correct(W, softmax(k + U_k @ x), v + U_v @ x, beta)
    return W, U_q, U_k, U_v, W @ softmax(q + U_q @ x)


@rule(cite=_IRIE)
def delta_lstm(
    W: Matrices, R: ValueMatrices, c: ValueState, y: ValueState, q: Query, k: Keys, v: Values, beta: Rates,
    k_r: Values, v_r: Values, beta_r: Rates,
):  # fmt: skip
    """An LSTM whose six matrices are fast: forget gate, input and output gate each of W_i q + R_i softmax(y before), input 1 - forget."""
    W = torch.stack([correct(W[i], k[i], v[i], beta[i]) for i in range(3)])
    R = torch.stack([correct(R[i], softmax(k_r[i]), v_r[i], beta_r[i]) for i in range(3)])
    z = [W[i] @ q + R[i] @ softmax(y) for i in range(3)]
    keep = torch.sigmoid(z[0])
    c = keep * c + (1 - keep) * torch.tanh(z[1])
    y = torch.sigmoid(z[2]) * torch.tanh(c)
    return W, R, c, y, y


@rule(cite=_IRIE)
def rdn(
    W, y: ValueState, q: Query, k: Key, v: Value, b: Scalar,
    R_q: SlowMatrix, R_k: SlowMatrix, R_v: SlowValueMatrix, r_b: SlowValue,
):  # fmt: skip
    """Recurrent DeltaNet: query, key, value and rate each also see what was read last, through slow matrices R and tanh."""
    last = torch.tanh(y)
    query, key = softmax(q + last @ R_q), softmax(k + last @ R_k)
    W = correct(W, key, v + R_v @ last, torch.sigmoid(b + r_b @ last))
    y = W @ query
    return W, y, y


# ---- self-reference: Schmidhuber 1993; Irie, Schlag, Csordas and Schmidhuber 2022 ----------------------------------------------------

_SRWM = "Schmidhuber 1993, ICANN; Irie, Schlag, Csordas and Schmidhuber 2022, ICML (A modern self-referential weight matrix)"


@rule(cite=_SRWM)
def srwm(
    W, Q: KeyMatrix, P: KeyMatrix, B: Annotated[KeyState, several(4)], x: Key,
    W_0: SlowMatrix, Q_0: SlowKeyMatrix, P_0: SlowKeyMatrix, B_0: Annotated[SlowKey, several(4)],
):  # fmt: skip
    """A matrix that rewrites itself: y, q, k and four rates are what it reads of softmax(x), and each part, at its rate, by the delta rule.

    (y, k, q, beta) = (W, P, Q, B) phi(x); every part M <- M + sigmoid(beta_M) (M phi(q) - M phi(k)) phi(k)^T, phi = softmax. Trained is
    only the matrix at the beginning; the states are shifts from it.
    """
    W, Q, P, B = W + W_0, Q + Q_0, P + P_0, B + B_0
    phi = softmax(x)
    y, key, query, rate = W @ phi, softmax(P @ phi), softmax(Q @ phi), torch.sigmoid(B @ phi)
    change = query - key
    new = [M + outer(rate[i] * (M @ change), key) for i, M in enumerate((W, Q, P, B))]
    return new[0] - W_0, new[1] - Q_0, new[2] - P_0, new[3] - B_0, y


@rule(cite=_SRWM)
def srwm_fixed(W, x: Key, W_0: SlowMatrix):
    """The control of SRWM that does not modify itself: a slow layer of softmax(x)."""
    return W, W_0 @ softmax(x)


@rule(cite=_SRWM)
def srwm_delta(W, x: Key, W_0: SlowMatrix, Q_0: SlowKeyMatrix, P_0: SlowKeyMatrix, b_0: SlowKey):
    """The control of SRWM of which only the part that makes y is rewritten: keys, queries and rates are slow."""
    W, phi = W + W_0, softmax(x)
    key, query = softmax(P_0 @ phi), softmax(Q_0 @ phi)
    new = W + outer(torch.sigmoid(b_0 @ phi) * (W @ (query - key)), key)
    return new - W_0, W @ phi


# ---- older and other fast weights --------------------------------------------------------------------------------------------------------


@rule(cite="Ba, Hinton, Mnih, Leibo and Ionescu 2016, NeurIPS (Using fast weights to attend to the recent past)")
def attend_to_the_past(A: ValueMatrix, h: ValueState, v: Value, C: SlowValueMatrix, eta: SlowScalar, g: LogDecay):
    """A recurrent network that attends to its recent states: A <- decay A + eta h h^T, and with z = C h + x, h = f(LN(z + A f(z)))."""
    A = g.exp() * A + eta * outer(h, h)
    slow = C @ h + v
    h = torch.relu(_layer_norm(slow + A @ torch.relu(slow)))
    return A, h, h


def _layer_norm(x):
    x = x - x.mean()
    return x / ((x * x).mean() + 1e-5).sqrt()


@rule(cite="Schlag and Schmidhuber 2017, NIPS workshop on meta-learning (Gated fast weights for on-the-fly neural program generation)")
def gated_fast_weights(W, k: Key, v: Value, a: KeyVector, b: ValueVector):
    """A write that replaces: W <- T o W + (1 - T) o v k^T, with a gate for every weight, T = sigmoid(b a^T)."""
    T = torch.sigmoid(outer(b, a))
    return T * W + (1 - T) * outer(v, k)


@rule(cite="Schlag, Munkhdalai and Schmidhuber 2021, ICLR (Learning associative inference using fast weight memory)")
def fwm(F: ValueCube, s: Value, r: Value, v: Value, beta: Rate, n: Value, e: Annotated[Value, several(3)]):
    """Fast weight memory: keys are tensor products s (x) r, so F has three axes; what is read is a part of the next query, three times.

    F is divided by its norm where that is above 1. n is the first query, e the relations that are followed; y is the last read.
    """
    W = correct(F.flatten(1), _tensor(torch.tanh(s), torch.tanh(r)), torch.tanh(v), beta)
    W = W / torch.maximum((W * W).sum().sqrt(), 1 + 0 * beta)
    n = torch.tanh(n)
    for i in range(3):
        n = _layer_norm(W @ _tensor(n, torch.tanh(e[i])))
    return W.reshape(F.shape), n


def _tensor(s, r):
    return outer(s, r).reshape(-1)


@rule(cite="Miconi, Stanley and Clune 2018, ICML (Differentiable plasticity)")
def differentiable_plasticity(H: ValueMatrix, y: ValueState, v: Value, w: SlowValueMatrix, alpha: SlowValueMatrix, eta: Rate):
    """A recurrent network with plastic connections: y = tanh((w + alpha o H) y + x), H <- (1 - eta) H + eta y y_before^T."""
    new = torch.tanh((w + alpha * H) @ y + v)
    return (1 - eta) * H + eta * outer(new, y), new, new


@rule(cite="Miconi, Rawal, Clune and Stanley 2019, ICLR (Backpropamine)")
def backpropamine(
    H: ValueMatrix, E: ValueMatrix, y: ValueState, v: Value, w: SlowValueMatrix, alpha: SlowValueMatrix, m: SlowValue, eta: Rate
):
    """Differentiable plasticity under a neuromodulator of the network's own: H <- clip(H + M E) of a Hebbian trace E, M = tanh(m . y)."""
    new = torch.tanh((w + alpha * H) @ y + v)
    H = torch.clamp(H + torch.tanh(m @ new) * E, -1, 1)
    return H, (1 - eta) * E + eta * outer(new, y), new, new


@rule(cite="Aitken and Mihalas 2023, eLife 12:e83035 (Multi-plasticity networks)")
def mpn(M, k: Key, W_0: SlowMatrix, b: SlowValue, eta: SlowScalar, g: LogDecay):
    """A network without recurrent connections, h = tanh((W_0 + W_0 o M) x + b), whose weights M <- decay M + eta h x^T modulates."""
    h = torch.tanh((W_0 + W_0 * M) @ k + b)
    return g.exp() * M + eta * outer(h, k), h
