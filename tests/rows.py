"""The rules under test: the catalogue, its compositions, and rules that only a user would write. One row of data a rule."""

import torch

import fastweights as fw
from fastweights import Key, KeyState, KeyVector, LogDecay, Matrix, Query, Rate, Value, ValueState, ValueVector, outer
from fastweights.language.roles import Gate

R = fw.rules


@fw.rule
def simultaneous(W, k: Key, k2: Key, v: Value, beta: Rate):
    return W - beta * outer(W @ k, k) - beta * outer(W @ k2, k2) + outer(v, k)


@fw.rule
def moving_average(W, k: Key, v: Value, beta: Rate):
    return (1 - beta) * W + beta * outer(v, k)


@fw.rule
def towards(W, k: Key, v: Value, beta: Rate):
    return W + beta * (outer(v, k) - W)


@fw.rule
def as_in_the_paper(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    identity = torch.eye(k.shape[0], dtype=k.dtype, device=k.device)
    return (W * g.exp()) @ (identity - beta * outer(k, k)) + beta * v[:, None] * k


@fw.rule
def self_target(W, k: Key, x: Key, u: ValueVector, beta: Rate):
    v = W @ x
    return W + beta * outer(v + u - W @ k, k)


@fw.rule
def looped(W, k: Key, v: Value, beta: Rate):
    for i in range(3):
        W = W + outer(beta / (i + 1) * (v - W @ k), k)
    return W


@fw.rule
def functions_of_signals(W, k: Key, v: Value, beta: Rate):
    kk = torch.nn.functional.normalize(torch.cat([k[:2], torch.zeros_like(k[2:])]) + 0.1, dim=0)
    return W + outer(torch.sigmoid(beta) * (v - W @ kk), kk / (1 + k @ k))


@fw.rule
def reads_between(W, q: Query, k: Key, v: Value, k2: Key, beta: Rate, g: LogDecay):
    W1 = W * g.exp() + outer(v, k)
    r = W1 @ q
    W2 = W1 - beta * outer(W1 @ k2, k2)
    return W2 * 0.9, torch.tanh(r) * (W2 @ q) + (W @ q)


@fw.rule
def reads_backward(W, q: Query, k: Key, v: Value, u: ValueVector, beta: Rate, g: LogDecay):
    W = W * g.exp()
    W = W + outer(beta * (v - W @ k), k)
    return W, (W.mT @ u)[:2].sum() * (W @ q)


@fw.rule
def linear_decay(W, k: Key, v: Value, b: KeyVector):
    W = W * b
    return W + outer(v - W @ k, k)


@fw.rule
def row_decay(W, k: Key, v: Value, b: ValueVector):
    return b[:, None] * W + outer(v, k)


@fw.rule
def traces(W, e: KeyState, p: ValueState, k: Key, v: Value, a: Gate):
    e = a * e + k
    return W + outer(v, e) - outer(p, k), e, 0.5 * p + v


@fw.rule
def amnesia(W, k: Key, v: Value):
    return outer(v, k)


AFFINE = [
    *R.CATALOGUE, R.delta * 2, R.gated_delta * 3, R.hebb * 2, R.gated_delta.T, R.gated_delta.T * 2, R.hebb >> R.delta,
    simultaneous, simultaneous * 2, moving_average, towards, as_in_the_paper, self_target, looped, functions_of_signals,
    reads_between, reads_backward, linear_decay, row_decay, traces, amnesia,
]  # fmt: skip


@fw.rule
def squashed(W, k: Key, v: Value):
    return W + outer(v - torch.tanh(W @ k), k)


@fw.rule
def rows_and_columns(W, k: Key, v: Value, b: ValueVector):
    W = b[:, None] * W
    return W + outer(v - W @ k, k)


@fw.rule
def hesitant(W, k: Key, v: Value):
    if (W @ k).norm() > 0.5:
        return W
    return W + outer(v, k)


@fw.rule
def momentum(W, M: Matrix, k: Key, v: Value, beta: Rate, mu: Rate):
    M = mu * M + outer(v - W @ k, k)
    return W + beta * M, M


@fw.rule
def product_of_reads(W, k: Key, v: Value):
    return W + outer((W @ k) * (W @ k) - v, k)


@fw.rule
def addressed_by_a_read(W, q: Query, k: Key, v: Value):
    return W + outer(v, k), W @ torch.softmax((W.mT @ v) + q, -1)


NOT_AFFINE = {
    squashed: "tanh of a read of W",
    rows_and_columns: "acts on the rows of W",
    hesitant: "control flow depends on the data",
    momentum: "second matrix",
    product_of_reads: "product of two values that depend on W",
    addressed_by_a_read: "the output uses W other than by W @ x",
}


def name(rule):
    return rule.name


def state_for(rule, B, H, K, V, dtype=torch.float64, seed=7):
    """Random states of about a third."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [s.shapes(K, V)[0] for s in rule.states.values()]
    return tuple(0.3 * torch.rand(B, H, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
