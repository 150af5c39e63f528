"""``ContinuousLayer``: fast weights that follow a differential equation between samples (ODE and CDE fast weight programmers)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engine.gated_norm import gated_norm
from ..engine.step import step as one_token
from ..language.errors import SignalError, SignalTypeError
from ..language.rule import Rule
from .flow import ADAPTIVE, GRADIENTS, METHODS, Solver, driver, require_flow, run_steps, runge_kutta
from .interpolation import KINDS, Pieces
from .norms import RMSNorm
from .programmer import Programmer
from .samples import Samples, gathered, kept_bytes

State = dict[str, Tensor]


class ContinuousLayer(nn.Module):
    """Fast weights in continuous time: dW/dt = rule(W, s(t)) - W along a path x(t) through the samples, read as y_i = W(t_i) q(x_i).

    For ``hebb_rate``, ``oja`` and ``delta`` that is dW/dt = beta {v k^T, v (k - W^T v)^T, (v - W k) k^T}. The programmer makes the
    signals s(t) of x(t) (``ode``); in a ``cde`` it makes one of them of dx/dt: the value, or the key where the rule still writes
    without a value. So v for Hebb and Oja and k for delta, as in the paper: W stands still where x does. W is zero at the first sample.

    ``y, state = layer(x, state, reset, times=times)``: x and y (B, T, d_model), times in seconds, (T,) or (B, T), one second after
    another by default. NaN in x is a missing value (see ``interpolate``). Time itself is a signal only if it is a channel of x. With the
    paths ``linear``, ``hermite`` and ``rectilinear`` a sequence may be cut anywhere: the state holds W, the last sample, its slope
    (``hermite``), its time and the number of samples so far. A path that looked ahead (``natural``, or missing values other than
    ``rectilinear``) gives a state of W alone, from which no call goes on. Before samples marked in ``reset``, bool (B, T), W is zero
    and a new path begins.

    Args:
        rule: any rule with one matrix W.
        kind, path: ``ode`` or ``cde``; ``linear``, ``hermite``, ``rectilinear`` or ``natural``.
        method: ``euler``, ``midpoint``, ``rk4``, or with torchdiffeq ``dopri5``, ``dopri8``, ``bosh3`` (in which cut or batched
            sequences agree to the tolerances ``rtol`` and ``atol``).
        step: the longest step of the first three in seconds; None is one step from sample to sample (two if ``rectilinear``).
        gradient: ``direct``; ``checkpoint``, with less memory and the same numbers; or ``adjoint`` (with torchdiffeq), with the least, and
            exact as steps shrink: it follows W backwards, where all that W forgot grows again, so that fast forgetting asks for small ones.
        derivative: in a ``cde``, the signals that are made of dx/dt instead.
        heads, d_key, d_value, output_norm, output_gate: as in ``FastWeightLayer``.
        programmer: a module of your own: ``signals, _ = programmer(x, None)`` of each moment by itself, in a ``cde`` also of dx/dt.
        options: passed to ``Programmer``, which has no convolution here. Values of dx/dt are linear in it by default.

    Source: Irie, Faccio and Schmidhuber 2022, NeurIPS (Neural differential equations for learning to program neural nets through
    continuous learning rules).

    >>> import torch, fastweights as fw
    >>> layer = ContinuousLayer(fw.rules.delta, 32, heads=2, kind="cde")
    >>> y, state = layer(torch.randn(1, 5, 32), times=torch.tensor([0.0, 0.1, 0.7, 0.8, 2.0]))
    >>> y.shape, state["time"].item()
    (torch.Size([1, 5, 32]), 2.0)
    """

    def __init__(
        self,
        rule: Rule,
        d_model: int,
        *,
        kind: str = "ode",
        path: str = "linear",
        method: str = "midpoint",
        step: float | None = None,
        gradient: str = "direct",
        rtol: float = 1e-5,
        atol: float = 1e-6,
        derivative: tuple[str, ...] | None = None,
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        output_norm: bool = True,
        output_gate: bool = True,
        programmer: nn.Module | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        _check_options(rule, kind, path, method, step, gradient)
        if heads < 1 or ((d_key is None or d_value is None) and d_model % heads):
            raise SignalError(f"d_model = {d_model} is not a multiple of heads = {heads}; give d_key and d_value, or other heads")
        self.rule, self.d_model, self.heads = rule, d_model, heads
        self.kind, self.path, self.method, self.step = kind, path, method, step
        self.d_key, self.d_value = d_key or d_model // heads, d_value or d_model // heads
        self.derivative = _driven(rule, kind, derivative)
        self.flow = runge_kutta(rule, method) if method in METHODS else None
        self.solver = Solver(method, gradient, rtol, atol)
        if programmer is None:
            if options.get("conv", 1) != 1:
                raise SignalError(f"conv is {options['conv']}, but in continuous time the signals are made of one moment; leave conv = 1")
            linear = any(rule.signals[n].role.name == "Value" for n in self.derivative)
            options = {"conv": 1, **({"values": "identity"} if linear else {}), **options}
            programmer = Programmer(rule, d_model, heads=heads, d_key=self.d_key, d_value=self.d_value, **options)  # type: ignore[arg-type]
        elif options:
            raise SignalError(f"{', '.join(options)} are options of the default programmer, and another programmer was given")
        self.programmer = programmer
        self.d_feature = getattr(programmer, "d_feature", self.d_key)  # of W
        self.norm = RMSNorm(self.d_value) if output_norm else None
        self.gate = nn.Linear(d_model, heads * self.d_value, bias=False) if output_gate else None
        self.out = nn.Linear(heads * self.d_value, d_model, bias=False)

    def forward(
        self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None, *, times: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SignalError(f"x is {found}, expected a tensor (B, T, d_model = {self.d_model})")
        samples = gathered(self.path, x, state, reset, times)
        name = next(iter(self.rule.states))
        W = self._empty(x) if state is None else state[name]
        by_steps = self.flow is not None and self.solver.gradient != "adjoint"
        x = samples.x.to(x.dtype)
        q = self.programmer(x, None)[0]["q"]
        y, W = self._by_steps(samples, q, W, reset is not None) if by_steps else self._solved(samples, q, W)
        y, gate = y.flatten(2).to(x.dtype), None if self.gate is None else self.gate(x)
        y = gated_norm(y, gate) if self.norm is None else self.norm(y, gate)
        return self.out(y), {name: W, **samples.state}

    def _empty(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.zeros(x.shape[0], self.heads, self.d_value, self.d_feature, dtype=dtype, device=x.device)

    def _signals(self, pieces: Pieces, s: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The signals ``s`` (B, P, N) seconds into each piece: (B, P, heads, N, ...)."""
        P, N = s.shape[1:]
        made = self.programmer(pieces.values(s).flatten(1, 2).to(dtype), None)[0]
        if self.derivative:
            of_slope = self.programmer(pieces.slopes(s).flatten(1, 2).to(dtype), None)[0]
            made = {n: of_slope[n] if n in self.derivative else z for n, z in made.items()}
        return {n: z.unflatten(1, (P, N)).movedim(2, 3) for n, z in made.items() if n in self.rule.arguments.signals}

    def _steps(self, pieces: Pieces) -> Tensor:
        """How many steps each piece takes, (B, P)."""
        if self.step is None:
            return torch.ones_like(pieces.seconds, dtype=torch.int64)
        return (pieces.seconds / self.step * (1 - 1e-9)).ceil().long().clamp(min=1)

    def _by_steps(self, samples: Samples, q: Tensor, W: Tensor, resets: bool) -> tuple[Tensor, Tensor]:
        """All steps as tokens of one scan: what rows lack of the most steps of a piece are steps of no time."""
        assert self.flow is not None
        T, own = samples.x.shape[1], self._steps(samples.pieces)
        P = own.shape[1]
        counts = torch.cat([own, torch.ones_like(own[:1])]).amax(0)
        piece = torch.arange(P, device=own.device).repeat_interleave(counts)
        number = torch.arange(len(piece), device=own.device) - (counts.cumsum(0) - counts)[piece]
        each = samples.pieces.at(piece)
        h = torch.where(number < own[:, piece], each.seconds / own[:, piece], 0)
        nodes = torch.tensor(METHODS[self.method].nodes, dtype=h.dtype, device=h.device)
        made = self._signals(each, (number + nodes[:, None]).mT * h.unsqueeze(-1), q.dtype)
        signals = {n: self._stages(n, z) for n, z in made.items()}
        sample = piece // max(P // max(T, 1), 1)
        signals |= {"q": q[:, sample], "step": h.unsqueeze(-1).to(torch.promote_types(q.dtype, torch.float32))}
        opens = torch.cat([torch.ones_like(sample[:1]), sample.diff()]).bool() if len(sample) else sample.bool()
        reset = samples.first[:, sample] & opens if resets else None
        y, W = run_steps(self.flow, W, signals, reset, save_memory=self.solver.gradient == "checkpoint")
        return y[:, torch.cat([opens[1:], opens[:1]])], W  # read after the last step of each sample

    def _stages(self, name: str, z: Tensor) -> Tensor:
        """(B, P, heads, stages, ...) as the sets of a signal of the step's rule."""
        if z.shape[3] == 1:
            return z.squeeze(3)
        return z if self.rule.arguments.signals[name].sets is None else z.flatten(3, 4)

    def _solved(self, samples: Samples, q: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Piece by piece by torchdiffeq."""
        T, P = samples.x.shape[1], samples.pieces.seconds.shape[1]
        dtype, q = q.dtype, q.repeat_interleave(self.heads // q.shape[2], 2).to(W.dtype)
        counts, y = self._steps(samples.pieces).amax(0) if T else [], []
        for i in range(P):
            if i % (P // T) == 0:
                W = torch.where(samples.first[:, i // (P // T), None, None, None], 0, W)
            W = self._along(samples.pieces.at(slice(i, i + 1)), W, int(counts[i]), dtype)
            if (i + 1) % (P // T) == 0:
                y.append(torch.einsum("bhvk,bhk->bhv", W, q[:, i // (P // T)]))
        return torch.stack(y, 1) if y else W.new_zeros(W.shape[0], 0, self.heads, self.d_value), W

    def _along(self, piece: Pieces, W: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        """W after one piece; its time runs from 0 to 1 in all rows."""
        dt = piece.seconds[:, :, None]

        def slope(t: Tensor, W: Tensor) -> Tensor:
            signals = {n: z[:, 0, :, 0] for n, z in self._signals(piece, t * dt, dtype).items()}
            change = one_token(self.rule, W, q=W.new_zeros(*W.shape[:2], W.shape[3], dtype=dtype), **signals).state - W
            return dt.unsqueeze(-1).to(W.dtype) * change

        parameters = [p for p in (piece.coefficients, *self.programmer.parameters()) if p.requires_grad]
        return self.solver(slope, W, parameters, steps)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence in float32: the same for any number of tokens."""
        del tokens
        return 4 * self.heads * self.d_value * self.d_feature + kept_bytes(self.path, self.d_model)

    def extra_repr(self) -> str:
        made = f" of dx/dt: {', '.join(self.derivative)}," if self.derivative else ""
        return f"{self.kind} of {self.rule.name},{made} path={self.path}, method={self.method}, d_model={self.d_model}, heads={self.heads}"


def _check_options(rule: object, kind: str, path: str, method: str, step: float | None, gradient: str) -> None:
    if not isinstance(rule, Rule):
        raise SignalTypeError(f"rule is a {type(rule).__name__}, expected a Rule such as fw.rules.delta, or a function under @fw.rule")
    require_flow(rule)
    for what, given, known in (
        ("kind", kind, ("ode", "cde")),
        ("path", path, KINDS),
        ("method", method, (*METHODS, *ADAPTIVE)),
        ("gradient", gradient, GRADIENTS),
    ):
        if given not in known:
            raise SignalError(f"{what} is {given!r}; known: {', '.join(known)}")
    if step is not None and (method in ADAPTIVE or not step > 0):
        raise SignalError(f"step is {step} s: it is positive, and of {', '.join(METHODS)} only; {', '.join(ADAPTIVE)} take rtol and atol")


def _driven(rule: Rule, kind: str, derivative: tuple[str, ...] | None) -> tuple[str, ...]:
    """The signals that are made of dx/dt."""
    if kind == "ode":
        if derivative is not None:
            raise SignalError("derivative names the signals of a cde that are made of dx/dt; in an ode all are made of x")
        return ()
    if derivative is None:
        if (found := driver(rule)) is None:
            raise SignalError(
                f"{rule.name} moves W even without a key or a value, so W would not rest where x does; pass derivative=('v',)"
            )
        return (found,)
    if unknown := [n for n in derivative if n not in rule.arguments.signals]:
        raise SignalError(f"{rule.name} has no signal {', '.join(map(repr, unknown))}; its signals are {', '.join(rule.arguments.signals)}")
    return tuple(derivative)
