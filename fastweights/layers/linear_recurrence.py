"""Recurrences in which every number has a decay of its own, h_t = a_t h_{t-1} + b_t, run in blocks; and selective scans made of them.

A rule whose decay is a matrix, W_vk <- exp(dt_v A_vk) W_vk + (dt_v x_v) B_k (Mamba), is ``decayed_hebb`` with a head for each value
channel (``selective_signals``). With one value a head the matrix products that the other forms live on are of size one; what is here
is as fast as the compiled kernels in float32, many times faster than the chunk form in float64, and runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..engine.scan import Output
from ..language.errors import SignalError

_SEQUENTIAL = 16  # steps that are taken one after the other
_NUMBERS_A_SPAN = {"cpu": 2**20}  # of h: on a CPU a span stays in the cache
_NUMBERS_A_SPAN_ELSEWHERE = 2**24


def linear_recurrence(a: Tensor, b: Tensor, start: Tensor, reset: Tensor | None = None) -> Tensor:
    """Every h_t = a_t h_{t-1} + b_t, number by number: a and b (B, T, ...) alike, real or complex, h_{-1} = start (B, ...).

    The sequence is cut into about sqrt(T) blocks. All blocks run at once from zero, with the products of their decays beside them;
    the ends of the blocks are a recurrence of the same kind. Decays are only multiplied, so any may be zero or vanish in a product.
    Before the tokens marked in ``reset``, bool (B, T), h is zero, whatever it was. Memory is that of a few tensors (B, T, ...).
    Every derivative exists. Raises SignalError if shapes differ.

    >>> a, b = torch.full((1, 4), 0.5), torch.ones(1, 4)
    >>> linear_recurrence(a, b, torch.zeros(1)).tolist()
    [[1.0, 1.5, 1.75, 1.875]]
    """
    if a.shape != b.shape or a.ndim < 2 or start.shape != b.shape[:1] + b.shape[2:]:
        raise SignalError(
            f"a is {tuple(a.shape)}, b {tuple(b.shape)} and start {tuple(start.shape)}, expected a and b alike, (B, T, ...), "
            "and start without their T"
        )
    if not b.shape[1]:
        return b
    if reset is not None:
        a = a.masked_fill(reset.reshape(*reset.shape, *(1,) * (a.ndim - 2)), 0)
    return _Recurrence.apply(a, b, start, reset is not None)  # type: ignore[no-any-return]


class _Recurrence(torch.autograd.Function):
    """With G_t = dL/dh_t + conj(a_{t+1}) G_{t+1}, the same recurrence backwards: db = G, da_t = G_t conj(h_{t-1})."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, start: Tensor, forgets: bool) -> Tensor:
        return _blocks(a, b, start, forgets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, start, ctx.forgets = inputs
        ctx.save_for_backward(a, start, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, start, h = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()
        G = _Recurrence.apply(later.flip(1), grad.flip(1), torch.zeros_like(start), ctx.forgets).flip(1)
        before = torch.cat([start.unsqueeze(1), h[:, :-1]], 1)
        return G * before.conj(), G, a[:, 0].conj() * G[:, 0], None


def _blocks(a: Tensor, b: Tensor, start: Tensor, forgets: bool) -> Tensor:
    steps = b.shape[1]
    if steps <= _SEQUENTIAL:
        h = torch.empty_like(b)
        for t in range(steps):
            _step(a[:, t], start if t == 0 else h[:, t - 1], b[:, t], h[:, t], forgets)
        return h
    length = max(math.isqrt(steps), _SEQUENTIAL // 2)
    a, b = (_in_blocks(x, length, nothing) for x, nothing in ((a, 1), (b, 0)))
    h, left = torch.empty_like(b), torch.empty_like(a)
    h[:, :, 0], left[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for i in range(1, length):
        _step(a[:, :, i], h[:, :, i - 1], b[:, :, i], h[:, :, i], forgets)
        torch.mul(a[:, :, i], _kept(a[:, :, i], left[:, :, i - 1], forgets), out=left[:, :, i])
    ends = _blocks(left[:, :, -1], h[:, :, -1], start, forgets)
    before = torch.cat([start.unsqueeze(1), ends[:, :-1]], 1).unsqueeze(2).expand_as(h)
    _step(left, before, h, h, forgets)
    return h.flatten(1, 2)[:, :steps]


def _in_blocks(x: Tensor, length: int, nothing: int) -> Tensor:
    missing = -x.shape[1] % length
    if missing:
        x = torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), nothing)], 1)
    return x.unflatten(1, (-1, length))


def _step(a: Tensor, h: Tensor, b: Tensor, out: Tensor, forgets: bool) -> None:
    """out = a h + b."""
    torch.addcmul(b, a, _kept(a, h, forgets), out=out)


def _kept(a: Tensor, h: Tensor, forgets: bool) -> Tensor:
    """h, of which a decay of zero leaves nothing, not even what is not finite, if that may be asked for."""
    return torch.where(a == 0, torch.zeros((), dtype=h.dtype, device=h.device), h) if forgets else h


def in_spans(run: Callable[..., tuple[Tensor, Tensor]], sequences: tuple[Tensor | None, ...], state: Tensor) -> Output:
    """``y, state = run(state, *parts)`` over consecutive spans of sequences (B, T, ...), as long as memory allows for a state a token.

    What a span computes is computed again for its gradient, so that a backward pass, too, holds one span at a time.
    """
    first = next(s for s in sequences if s is not None)
    most = _NUMBERS_A_SPAN.get(first.device.type, _NUMBERS_A_SPAN_ELSEWHERE)
    length = max(most // max(state.numel(), 1), _SEQUENTIAL)
    spans = len(first.split(length, 1))
    columns = [[None] * spans if s is None else s.split(length, 1) for s in sequences]
    ys = []
    for parts in zip(*columns, strict=True):
        if torch.is_grad_enabled() and spans > 1:
            y, state = checkpoint(run, state, *parts, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            y, state = run(state, *parts)
        ys.append(y)
    return Output(ys[0] if len(ys) == 1 else torch.cat(ys, 1), state)


def last(h: Tensor, start: Tensor) -> Tensor:
    """The last of h (B, T, ...), in memory of its own: a view would keep all of them."""
    return h[:, -1].clone() if h.shape[1] else start


def selective_scan(
    *, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> Output:
    """The selective scan of Mamba: W_t = exp(dt_t A) * W_{t-1} + (dt_t x_t) B_t^T, y_t = W_t C_t.

    Args:
        x, dt: (B, T, V), the values and their steps dt >= 0; V channels.
        A: (V, K), at most 0: the rates of decay in continuous time.
        B, C: (B, T, K), the keys and queries of all channels.
        state: W before the first token, (B, V, K); zero if not given.
        reset: bool (B, T), W is zero before these tokens.

    Returns ``(y, state)``: y (B, T, V), the state (B, V, K). Runs in spans, so that memory does not grow with T V K, and in blocks
    within a span (``linear_recurrence``). Source: Gu and Dao 2023, arXiv 2312.00752 (S6).

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(x=one, dt=one, A=torch.tensor([[-0.6931472]]), B=one, C=one).y.flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    channels, keys = _sizes(x, dt, A, B, C)
    state = torch.zeros(x.shape[0], channels, keys, dtype=x.dtype, device=x.device) if state is None else state

    def run(W: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        h = linear_recurrence((dt.unsqueeze(-1) * A).exp(), (dt * x).unsqueeze(-1) * B.unsqueeze(2), W, reset)
        return (h @ C.unsqueeze(-1)).squeeze(-1), last(h, W)

    return in_spans(run, (x, dt, B, C, reset), state)


def _sizes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, int]:
    keys = A.shape[-1] if A.ndim == 2 else -1
    if x.ndim != 3 or dt.shape != x.shape or A.shape != (x.shape[2], keys) or {B.shape, C.shape} != {(*x.shape[:2], keys)}:
        raise SignalError(
            f"x is {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}; "
            "expected x and dt (B, T, V), A (V, K), B and C (B, T, K)"
        )
    return x.shape[2], keys


def selective_signals(*, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
    """The signals of ``decayed_hebb`` under which ``scan`` is a ``selective_scan``: a head for each channel, one value a head.

    >>> import fastweights as fw
    >>> one = torch.ones(1, 3, 2)
    >>> signals = selective_signals(x=one, dt=one, A=-one[0, :2], B=one, C=one)
    >>> torch.allclose(fw.scan(fw.rules.decayed_hebb, **signals).y[..., 0], selective_scan(x=one, dt=one, A=-one[0, :2], B=one, C=one).y)
    True
    """
    _sizes(x, dt, A, B, C)
    return {"q": C.unsqueeze(2), "k": B.unsqueeze(2), "v": (dt * x).unsqueeze(-1), "g": dt.unsqueeze(-1) * A}


class SSD(NamedTuple):
    """A state space model with a scalar decay (Mamba-2): x (B, T, H, V), dt (B, T, H), A (H,), B and C (B, T, groups, K)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def ssd_signals(*, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
    """The signals of ``stepped_hebb`` under which ``scan`` is Mamba-2: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

    x (B, T, H, V), dt (B, T, H), A (H,), B and C (B, T, groups, K): keys and queries, shared by the heads of a group.
    Source: Dao and Gu 2024, ICML.

    >>> import fastweights as fw
    >>> x = torch.ones(1, 2, 1, 1)
    >>> signals = ssd_signals(x=x, dt=0.5 * x[..., 0], A=torch.zeros(1), B=x, C=x)
    >>> fw.scan(fw.rules.stepped_hebb, **signals).y.flatten().tolist()
    [0.5, 1.0]
    """
    if dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise SignalError(f"x is {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}; expected (B, T, H, V), (B, T, H) and (H,)")
    return {"q": C, "k": B, "v": x, "dt": dt, "g": dt * A}


def ssd_parameters(*, q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor | None = None) -> SSD:
    """The state space model that signals of ``stepped_hebb`` are; without ``dt`` (all ones), those of ``decayed_hebb``.

    It exists where every head has one rate A = g / dt for all tokens; RetNet is Mamba-2 with dt = 1 and A = log gamma.
    Raises SignalError for a head that has not: its decay is not that of a time-invariant system sampled at steps dt.

    >>> x = torch.ones(1, 2, 1, 1)
    >>> ssd_parameters(q=x, k=x, v=x, dt=torch.tensor([[[0.5], [1.0]]]), g=torch.tensor([[[-1.0], [-2.0]]])).A
    tensor([-2.])
    """
    dt = torch.ones_like(g) if dt is None else dt
    if g.shape != dt.shape or g.ndim != 3:
        raise SignalError(f"g is {tuple(g.shape)} and dt {tuple(dt.shape)}, expected one number a head each, (B, T, H)")
    A = (g * dt).sum((0, 1)) / dt.square().sum((0, 1))
    off = (g - dt * A).abs().amax((0, 1))
    bad = ~(off <= 100 * torch.finfo(g.dtype).eps * g.abs().amax((0, 1)))
    if bad.any():
        heads = bad.nonzero().flatten().tolist()
        raise SignalError(f"g / dt of heads {heads} differs from token to token, so there is no A with g = dt A; change dt with g")
    return SSD(v, dt, A, k, q)
