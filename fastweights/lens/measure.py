"""Measures of the fast weights of one layer over a few tokens: states, what was kept, retrieval errors, ranks, what is recalled.

Signals are (B, T, H, ...) as in ``fw.scan``, ``state`` is the one before the first of these tokens, and W is (B, T, H, V, K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.inputs import check
from ..engine.recurrent import recurrent
from ..engine.scan import attention_matrix, scan
from ..engine.step import step
from ..language.rule import Rule

_PROBED = 8  # tokens on which it is tried whether what is read is linear in v


class Trajectory(NamedTuple):
    """Every state of a rule, W first, (B, T, H, ...): before and after each token."""

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


def trajectory(rule: Rule, signals: Mapping[str, Tensor], state: Any = None) -> Trajectory:
    """All states W_{t-1} and W_t, as the rule's own body makes them.

    About sqrt(T) scans find the states that are sqrt(T) tokens apart; from there all stretches go on side by side, so that it takes
    2 sqrt(T) steps where the recurrence takes T. A rule that is not affine in W has only the recurrence.

    >>> import torch, fastweights as fw
    >>> k = torch.ones(1, 3, 1, 1)
    >>> before, after = trajectory(fw.rules.hebb, {"q": k, "k": k, "v": k})
    >>> before[0].flatten().tolist(), after[0].flatten().tolist()
    ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    """
    given = check(rule, signals, state)
    start = at = given.states
    size = max(math.isqrt(given.T), 1) if rule.trace.program is not None else max(given.T, 1)
    whole = given.T - given.T % size
    starts, after = [], []
    for i in range(0, whole, size):
        starts.append(at)
        at = _states(scan(rule, state=at, **{n: x[:, i : i + size] for n, x in signals.items()}).state)
    if starts:
        apart = {n: x[:, :whole].unflatten(1, (-1, size)).flatten(0, 1) for n, x in signals.items()}
        each = _every(rule, apart, tuple(torch.stack(s, 1).flatten(0, 1) for s in zip(*starts, strict=True)))
        after.append([s.unflatten(0, (given.B, -1)).flatten(1, 2) for s in each])
    if whole < given.T:
        after.append(_every(rule, {n: x[:, whole:] for n, x in signals.items()}, at))
    if not after:
        return Trajectory(*[tuple(s.new_zeros(given.B, 0, *s.shape[1:]) for s in start)] * 2)
    joined = tuple(torch.cat(parts, 1) for parts in zip(*after, strict=True))
    return Trajectory(tuple(torch.cat([s.unsqueeze(1), a[:, :-1]], 1) for s, a in zip(start, joined, strict=True)), joined)


def _every(rule: Rule, signals: Mapping[str, Tensor], state: tuple[Tensor, ...]) -> list[Tensor]:
    every: list[tuple[Tensor, ...]] = []
    recurrent(check(rule, signals, state), every.append)
    return [torch.stack(parts, 1) for parts in zip(*every, strict=True)]


def _states(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def size(W: Tensor) -> Tensor:
    """The Frobenius norm |W| of matrices (..., V, K)."""
    return torch.linalg.matrix_norm(W)


def kept(rule: Rule, signals: Mapping[str, Tensor], states: Trajectory) -> Tensor:
    """The share of the old W that is still there after a token, |f_t(W) - f_t(0)| / |W| with W = W_{t-1}, (B, T, H).

    f_t is what the rule does to W at token t: for an affine rule f_t(W) = W M_t + u_t w_t^T, and this is |W M_t| / |W|, of which the
    write u_t w_t^T has no part. It is exp(g) where one decay a head is all the forgetting there is, sqrt(1 - |W k|^2 / |W|^2) for
    delta with beta = 1 and |k| = 1, and above 1 where a rule makes W grow by itself (oja may). NaN where W is
    zero, so that there is nothing to keep, and for rules that are not affine in W.

    >>> import torch, fastweights as fw
    >>> one = torch.ones(1, 3, 1, 1)
    >>> signals = {"q": one, "k": one, "v": one, "g": torch.full((1, 3, 1), 0.5).log()}
    >>> kept(fw.rules.decayed_hebb, signals, trajectory(fw.rules.decayed_hebb, signals)).flatten().tolist()
    [nan, 0.5, 0.5]
    """
    W, *others = (s.flatten(0, 1) for s in states.before)
    shape = states.before[0].shape[:3]
    if rule.trace.program is None or not W.numel():
        return W.new_full(shape, math.nan)
    written, *_ = _states(step(rule, (torch.zeros_like(W), *others), **{n: x.flatten(0, 1) for n, x in signals.items()}).state)
    old = size(W)
    share = size(states.after[0].flatten(0, 1) - written) / old
    return torch.where(old > 0, share, math.nan).view(shape)


def retrieval_error(W: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
    """How far what W has at the key is from the value, |v - W k| / |v|, (B, T, H); of several pairs a token the norms over all.

    NaN for rules without k and v, and where v is zero.

    >>> import torch
    >>> W, k, v = torch.eye(2).reshape(1, 1, 1, 2, 2), torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    >>> retrieval_error(W, {"k": v, "v": v}).item(), round(retrieval_error(W, {"k": k, "v": v}).item(), 4)
    (0.0, 1.4142)
    """
    if not {"k", "v"} <= signals.keys():
        return W.new_full(W.shape[:3], math.nan)
    k, v = (x.to(W.dtype) if x.ndim > 4 else x.to(W.dtype).unsqueeze(3) for x in (signals["k"], signals["v"]))
    k, v = (x.repeat_interleave(W.shape[2] // x.shape[2], 2) for x in (k, v))
    length = size(v)
    return torch.where(length > 0, size(v - torch.einsum("bthvk,bthnk->bthnv", W, k)) / length, math.nan)


def effective_rank(spectrum: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i) with p_i = s_i^2 / sum_j s_j^2 of singular values s (..., R): between 1 and R, and 0 where all are zero.

    The effective rank of Roy and Vetterli (2007), of the squares of the singular values: the share p_i is that of the energy |W|^2.

    >>> effective_rank(torch.tensor([[2.0, 2.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [2.0, 1.0, 0.0]
    """
    largest = spectrum.amax(-1, keepdim=True)
    energy = torch.where(largest > 0, spectrum / largest, 0.0) ** 2
    total = energy.sum(-1, keepdim=True)
    rank = torch.special.entr(energy / total.clamp(min=1)).sum(-1).exp()
    return torch.where(largest.squeeze(-1) > 0, rank, 0.0)


class Recall:
    """The effective attention of a rule, piece by piece: how much of which earlier value every read is made of.

    y_t = sum_s A_ts v_s + what is left of a state that was there first. ``rows(signals, state)`` of tokens that follow each other,
    ``state`` the one before them, are A_{t, t-a} for the ages a = 0, ..., window - 1, (B, T, H, window); ages from before the first
    token have weight 0. Between the pieces it keeps for each of the last ``window`` values how it stands in W, (B, H, window, K).

    Raises:
        FormError: the rule has no attention matrix (see ``fw.attention_matrix``), for example because it acts on the rows of W.

    >>> import torch, fastweights as fw
    >>> k = torch.ones(1, 3, 1, 1)
    >>> signals = {"q": k, "k": k, "v": k, "g": torch.full((1, 3, 1), 0.5).log()}
    >>> Recall(fw.rules.decayed_hebb, 3).rows(signals).squeeze(2).tolist()
    [[[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.25]]]
    """

    def __init__(self, rule: Rule, window: int) -> None:
        self.rule, self.window = rule, window
        self.standing: Tensor | None = None

    def rows(self, signals: Mapping[str, Tensor], state: Any = None) -> Tensor:
        given = check(self.rule, signals, state)
        if self.standing is None:
            attention_matrix(self.rule, **{n: x[:, :_PROBED] for n, x in signals.items() if n != "v"})
            self.standing = torch.zeros(given.B, given.H, self.window, given.K, dtype=given.dtype, device=given.device)
        # the rule runs on values that are one-hot in time: a row of W then says how one value stands in it
        T, L = given.T, self.window
        values = torch.eye(T, L + T, dtype=given.dtype, device=given.device).roll(L, 1)
        values = values[:, None].expand(given.B, T, given.H, L + T)
        new = self.standing.new_zeros(given.B, given.H, T, given.K)
        y, after = scan(self.rule, state=(torch.cat([self.standing, new], 2), *given.states[1:]), **{**signals, "v": values})
        self.standing = _states(after)[0][:, :, T:].clone()
        at = L + torch.arange(T, device=given.device)[:, None] - torch.arange(L, device=given.device)
        return y.gather(3, at[:, None].expand(given.B, T, given.H, L))


def mean_age(rows: Tensor) -> Tensor:
    """sum_a |A_{t, t-a}| a / sum_a |A_{t, t-a}| in tokens, of ``Recall.rows`` (..., window); NaN where nothing is recalled.

    >>> mean_age(torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]])).tolist()
    [0.5, 1.0]
    """
    weights = rows.abs()
    weights = weights / weights.amax(-1, keepdim=True)
    return weights @ torch.arange(rows.shape[-1], dtype=rows.dtype, device=rows.device) / weights.sum(-1)


def attention_of(rows: Tensor) -> Tensor:
    """A (H, N, N) of the last N tokens from their rows (N, H, window), N <= window: A_ts from row t at age t - s."""
    n = rows.shape[0]
    age = torch.arange(n, device=rows.device)[:, None] - torch.arange(n, device=rows.device)
    at = age.clamp(min=0)[:, None].expand(n, rows.shape[1], n)
    return (rows.gather(2, at) * (age >= 0)[:, None]).movedim(1, 0)
