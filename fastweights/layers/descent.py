"""``deep_scan``: any network as the fast weights, programmed by gradient descent on a loss, a mini-batch of tokens after the other.

Letters beside the usual ones: N = B H networks side by side, C tokens of one run, W the fast weights (all of them), f(x; W) the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.inputs import Inputs, check, one_of, whole_number
from ..engine.scan import Output
from ..engine.watched import may_look
from ..language.decorator import outer, rule
from ..language.errors import FormError, SignalError
from ..language.roles import Gate, Key, Matrix, Rate, Role, Value
from ..language.rule import Rule
from .fast_network import FORMS, Direct, Dual, Loss, Method, Weights, added, uses

LogDecay = Annotated[Tensor, Role("LogDecay", ("scalar",), "LogDecay", log_decay=True)]


@rule(name="descent")
def _plain(W, k: Key, v: Value, beta: Rate):
    """One descent step on 1/2 |v - W k|^2."""
    return W + beta * outer(v - W @ k, k)


@rule(name="descent")
def _forgetful(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    """The same beside forgetting: the gradient is that of the weights before it."""
    return W * g.exp() + beta * outer(v - W @ k, k)


@rule(name="descent")
def _with_momentum(W, S: Matrix, k: Key, v: Value, beta: Rate, momentum: Gate):
    """One step of descent with momentum on 1/2 |v - W k|^2."""
    S = momentum * S + beta * outer(v - W @ k, k)
    return W + S, S


@rule(name="descent")
def _with_both(W, S: Matrix, k: Key, v: Value, beta: Rate, momentum: Gate, g: LogDecay):
    """Momentum and forgetting."""
    S = momentum * S + beta * outer(v - W @ k, k)
    return W * g.exp() + S, S


# what ``deep_scan`` is for a linear network without bias, the loss 1/2 |v - W k|^2 and every = 1; by (momentum, forgetting)
LINEAR: dict[tuple[bool, bool], Rule] = {
    (False, False): _plain,
    (False, True): _forgetful,
    (True, False): _with_momentum,
    (True, True): _with_both,
}


def deep_scan(
    network: nn.Module,
    loss: Loss,
    *,
    params: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    momentum: Tensor | None = None,
    g: Tensor | None = None,
    every: int = 1,
    fixed: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    reset: Tensor | None = None,
    form: str = "auto",
) -> Output:
    """Programme a network by descent: at every token, with W' the weights at the beginning of its mini-batch of ``every`` tokens,

        S_t = momentum_t S_{t-1} - beta_t grad loss(f(k_t; W'), v_t),    W_t = exp(g_t) W_{t-1} + S_t,    y_t = f(q_t; W_t).

    Args:
        network: a map from one key (K,) to one value (V,). Every one of its parameters is named in ``params`` or in ``fixed``.
        loss: of an output of the network and a value, both (V,): a number.
        params: the weights before the first token, by their names in the network, each (H, ...): the fast weights begin so.
        q, k, v: (B, T, H, K) and (B, T, H, V).
        beta: rates (B, T, H).
        momentum: what the step keeps of the step before, (B, T, H); without it S_t is the gradient step alone.
        g: log of the decay of the weights, (B, T, H), <= 0; without it nothing is forgotten.
        every: tokens a mini-batch, whose gradients are all taken at the weights of its beginning.
        fixed: parameters of the network that descent leaves as they are, each (H, ...).
        state: as returned; ``None`` before the first token.
        reset: bool (B, T): before these tokens the weights are ``params`` again, and a mini-batch begins.
        form: ``direct`` makes the weights of every token, as many numbers as the network has, for every token of a mini-batch;
            ``dual`` never does: in a network whose fast weights are those of linear maps (torch.nn.functional.linear, as in
            torch.nn.Linear) each gradient is of rank one, and the maps of token t are attention to the inputs of the tokens before
            it. ``auto`` is dual where it may. Both give the same numbers, up to rounding.

    Returns:
        ``(y, state)``: y (B, T, H, V) in the dtype of v. The state is in float32 (float64 for float64 signals), of named tensors:
        ``W.NAME`` and, with momentum, ``S.NAME``, both (B, H, ...); where ``every`` is more than 1, ``start.NAME``, the weights at
        the beginning of the mini-batch that is not yet full, and ``count`` (B,), its number of tokens. Everything is differentiable.

    Raises:
        SignalError: something does not fit, or the fast weights have left the range of their dtype.
        FormError: dual, in a network that does not admit it.

    Source: Sun et al. 2024 (TTT: mini-batches, dual form); Behrouz, Zhong and Mirrokni 2025 (Titans: momentum, forgetting).

    >>> import torch
    >>> network, half_squared_error = torch.nn.Linear(1, 1, bias=False), lambda y, v: (y - v).square().sum() / 2
    >>> k = torch.ones(1, 4, 1, 1)
    >>> beta, W0 = torch.full((1, 4, 1), 0.5), {"weight": torch.zeros(1, 1, 1)}
    >>> y, state = deep_scan(network, half_squared_error, params=W0, q=k, k=k, v=8 * k, beta=beta, every=2)
    >>> y.flatten().tolist()  # two gradients at W = 0, two at W = 8
    [4.0, 8.0, 8.0, 8.0]
    """
    given = {n: x for n, x in {"q": q, "k": k, "v": v, "beta": beta, "momentum": momentum, "g": g}.items() if x is not None}
    inputs = check(LINEAR[momentum is not None, g is not None], given, None, reset)
    every, form = whole_number(inputs.rule, "every", every), one_of(inputs.rule, "form", form, ("auto", *FORMS))
    first, slow = _parameters(network, params, fixed or {}, inputs)
    with torch.autocast(inputs.device.type, enabled=False):  # small steps are lost in 16 bits
        method = _method(network, loss, params, fixed or {}, form, inputs)
        memory = _memory(state, first, momentum is not None, every, inputs)
        y, memory = _run(method, inputs, first, slow, memory, every)
    _check_finite(inputs, y, memory)
    return Output(y.to(inputs.out), memory)


def _run(method: Method, given: Inputs, first: Weights, slow: Weights, memory: Weights, every: int) -> tuple[Tensor, Weights]:
    """Tokens are run together as long as no mini-batch begins in any row."""
    now, speed, start = ({n: memory[f"{part}.{n}"].flatten(0, 1) for n in first if f"{part}.{n}" in memory} for part in ("W", "S", "start"))
    signals = {n: _all_heads(x, given.H).to(given.dtype).transpose(1, 2).flatten(0, 1) for n, x in given.signals.items()}
    begins, count = _begins(memory.get("count"), given, every)
    outputs = []
    for i, j in _runs(begins) if given.B else ():
        if given.reset is not None:
            again = given.reset[:, i].repeat_interleave(given.H)
            now = {n: _choose(again, first[n], w) for n, w in now.items()}
            speed = {n: _choose(again, torch.zeros_like(s), s) for n, s in speed.items()}
        fresh = begins[:, i].repeat_interleave(given.H).to(given.device)
        start = now if bool(begins[:, i].all()) else {n: _choose(fresh, w, start[n]) for n, w in now.items()}
        y, now, speed = _tokens(method, start, now, speed, slow, {n: x[:, i:j] for n, x in signals.items()})
        outputs.append(y)
    parts = {"W": now, "S": speed} | ({"start": start} if every > 1 else {})
    after = {f"{part}.{n}": w.unflatten(0, (given.B, given.H)) for part, weights in parts.items() for n, w in weights.items()}
    if every > 1:
        after["count"] = count.to(given.device)
    nothing = torch.zeros(given.B * given.H, given.T, given.V, dtype=given.dtype, device=given.device)
    y = torch.cat(outputs, 1) if outputs else nothing
    return y.unflatten(0, (given.B, given.H)).transpose(1, 2), after


class Mix(NamedTuple):
    """What the weights and the momentum of N networks are made of, after each of C tokens with gradients G_i.

    W_t = keep_t W_0 + push_t S_0 + sum_i steps_ti G_i, S_C = last_push S_0 + sum_i last_steps_i G_i: keep, push (N, C),
    steps (N, C, C), last_push (N,), last_steps (N, C).
    """

    keep: Tensor
    push: Tensor
    steps: Tensor
    last_push: Tensor
    last_steps: Tensor


def _tokens(
    method: Method, start: Weights, now: Weights, speed: Weights, slow: Weights, signals: Weights
) -> tuple[Tensor, Weights, Weights]:
    """The outputs of C tokens of one mini-batch, (N, C, V), and the weights and the momentum after them."""

    def one(start: Weights, now: Weights, speed: Weights, slow: Weights, x: Weights, mix: Mix) -> tuple[Tensor, Weights, Weights]:
        slopes = torch.vmap(method.slopes, (None, None, 0, 0))(start, slow, x["k"], x["v"])
        read = torch.vmap(method.read, (None, None, None, None, 0, 0, 0, 0))
        y = read(now, speed, slow, slopes, x["q"], mix.keep, mix.push, mix.steps)
        after = added(now, speed, method.total(slopes, mix.steps[-1]), mix.keep[-1], mix.push[-1])
        change = method.total(slopes, mix.last_steps) if speed else {}
        return y, after, {n: mix.last_push * s + change[n] for n, s in speed.items()}

    return torch.vmap(one)(start, now, speed, slow, signals, _mix(signals["beta"], signals.get("momentum"), signals.get("g")))


def _mix(beta: Tensor, momentum: Tensor | None, g: Tensor | None) -> Mix:
    """From ``beta``, ``momentum`` and ``g`` (N, C), without a division."""
    C = beta.shape[1]
    unit = torch.eye(C + 1, dtype=beta.dtype, device=beta.device)
    speeds = unit.expand(len(beta), -1, -1) if momentum is None else _products(momentum)
    decays = torch.ones_like(speeds).tril() if g is None else _products(g.exp())
    moved = decays[:, 1:, 1:] @ speeds[:, 1:]
    return Mix(decays[:, 1:, 0], moved[:, :, 0], -moved[:, :, 1:] * beta.unsqueeze(1), speeds[:, -1, 0], -speeds[:, -1, 1:] * beta)


def _products(a: Tensor) -> Tensor:
    """(N, C + 1, C + 1), entry (t, i) is a_{i+1} ... a_t and zero for i > t: the inverse of 1 - a on the line below the diagonal."""
    below = torch.diag_embed(a, offset=-1)
    unit = torch.eye(below.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve_triangular(unit - below, unit.expand_as(below), upper=False, unitriangular=True)


def _begins(count: Tensor | None, given: Inputs, every: int) -> tuple[Tensor, Tensor]:
    """Before which tokens a mini-batch begins, bool (B, T), and how many tokens the last one has, (B,); both on the host."""
    done = torch.zeros(given.B, dtype=torch.int64) if count is None else count.cpu()
    t = torch.arange(given.T).expand(given.B, -1)
    origin = (-done).unsqueeze(1).expand(-1, given.T)
    if given.reset is not None:
        origin = torch.where(given.reset.cpu(), t, origin).cummax(1).values
    place = (t - origin) % every
    return place == 0, (place[:, -1] + 1) % every if given.T else done


def _runs(begins: Tensor) -> Iterator[tuple[int, int]]:
    T = begins.shape[1]
    cuts = sorted({0, T, *begins.any(0).nonzero().flatten().tolist()})
    return zip(cuts[:-1], cuts[1:], strict=True)


def _choose(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _parameters(network: nn.Module, params: Mapping[str, Tensor], fixed: Mapping[str, Tensor], given: Inputs) -> tuple[Weights, Weights]:
    """The fast weights at the beginning and the fixed ones, (N, ...)."""
    wanted = dict(network.named_parameters())
    if twice := params.keys() & fixed.keys():
        raise SignalError(f"descent: {', '.join(sorted(twice))} is both in params and in fixed")
    if wanted.keys() != params.keys() | fixed.keys():
        raise SignalError(
            f"descent: params and fixed name {', '.join([*params, *fixed])}; the network's parameters are {', '.join(wanted)}: "
            "name each once"
        )
    if not params:
        raise SignalError("descent: params is empty, and a network without fast weights has nothing to descend")
    for n, w in (*params.items(), *fixed.items()):
        if tuple(w.shape) != (given.H, *wanted[n].shape):
            raise SignalError(f"descent: parameter {n!r} has shape {tuple(w.shape)}, expected (H, ...) = {(given.H, *wanted[n].shape)}")
        if w.device != given.device:
            raise SignalError(f"descent: parameter {n!r} is on {w.device}, but the signals are on {given.device}")

    def spread(w: Tensor) -> Tensor:
        return w.to(given.dtype).expand(given.B, *w.shape).flatten(0, 1)

    return {n: spread(w) for n, w in params.items()}, {n: spread(w) for n, w in fixed.items()}


def _method(network: nn.Module, loss: Loss, params: Mapping[str, Tensor], fixed: Mapping[str, Tensor], form: str, given: Inputs) -> Method:
    """The form that runs, after a trial of the network on one key."""
    fast, slow = ({n: w[0].detach().to(given.dtype) for n, w in weights.items()} for weights in (params, fixed))
    y, calls, others = uses(network, fast, slow, torch.zeros(given.K, dtype=given.dtype, device=given.device))
    if tuple(y.shape) != (given.V,):
        raise SignalError(f"descent: the network makes {tuple(y.shape)} of a key {(given.K,)}, expected a value {(given.V,)}")
    if form == "dual" and others:
        raise FormError(
            f"descent: form='dual' needs fast weights that are used by torch.nn.functional.linear of one vector and nowhere else; "
            f"{', '.join(others)}. Use form='direct', or give these parameters in fixed"
        )
    return Direct(network, loss) if form == "direct" or others else Dual(network, loss, calls)


def _memory(state: Mapping[str, Tensor] | None, first: Weights, momentum: bool, every: int, given: Inputs) -> Weights:
    """The state before the first token, checked."""
    begin = {f"W.{n}": w.unflatten(0, (given.B, given.H)) for n, w in first.items()}
    if every > 1:
        begin |= {f"start.{n}": begin[f"W.{n}"] for n in first}
        begin["count"] = torch.zeros(given.B, dtype=torch.int64, device=given.device)
    if momentum:
        begin |= {f"S.{n}": torch.zeros_like(begin[f"W.{n}"]) for n in first}
    if state is None:
        return begin
    if state.keys() != begin.keys():
        raise SignalError(f"descent: state has {', '.join(sorted(state))}; expected {', '.join(sorted(begin))}")
    for n, x in begin.items():
        found = (tuple(state[n].shape), state[n].dtype, state[n].device)
        if found != (tuple(x.shape), x.dtype, x.device):
            raise SignalError(f"descent: state {n!r} is {found}, expected {(tuple(x.shape), x.dtype, x.device)}")
    return dict(state)


def _check_finite(given: Inputs, y: Tensor, memory: Weights) -> None:
    if not may_look(y) or (bool(y.isfinite().all()) and all(bool(w.isfinite().all()) for w in memory.values())):
        return
    bad = [n for n, x in given.signals.items() if not bool(x.isfinite().all())]
    why = f"descent diverged at rates up to {given.signals['beta'].max().item():g}; lower beta, or give keys unit length"
    why = f"signal {', '.join(map(repr, bad))} is not finite" if bad else why
    raise SignalError(f"descent: the fast weights, or what they make of q, left the range of {given.dtype}: {why}")
