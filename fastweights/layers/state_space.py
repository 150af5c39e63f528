"""Diagonal state space models as layers: S4D, whose decays are fixed, and Mamba (S6), whose decays follow the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import SignalError
from .inputs import check_sequence, single, size
from .linear_recurrence import in_spans, last, linear_recurrence, selective_scan
from .programmer import ShortConvolution

State = dict[str, Tensor]

_NUMBERS_A_SPAN = 2**22  # of the powers of the decays
FORMS = ("auto", "convolution", "recurrence")


def _zero_order_hold(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return (dt * A).exp(), (dt * A).expm1() / A


def _bilinear(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)


def _euler(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return 1 + dt * A, dt.expand_as(A).to(A.dtype)


DISCRETISATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "zoh": _zero_order_hold,
    "bilinear": _bilinear,
    "euler": _euler,
}

# the rates A of a channel's states at first, by their number: all of them if real, one of each conjugate pair if complex
INITIALISATIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor | None]]] = {
    "real": lambda n, N: (-(n + 1), None),
    "lin": lambda n, N: (-0.5 + 0 * n, math.pi * n),
    "inv": lambda n, N: (-0.5 + 0 * n, N / math.pi * (N / (2 * n + 1) - 1)),
}


class S4D(nn.Module):
    """A diagonal state space model in each channel: h' = A h + u in continuous time, y = Re C h + D u, then GELU and a gated projection.

    Sampled at a learned step dt it is h_t = a h_{t-1} + b u_t: a fast weight matrix (d_model, d_state) with a fixed decay for every
    number, which every channel writes with its own b. ``y, state = layer(x, state, reset)``, x and y (B, T, d_model). The state is
    W (B, 1, d_model, d_state); complex states come in conjugate pairs, of which one is kept, its real part beside its imaginary part.

    Args:
        d_state: numbers of state a channel, even if they are complex.
        init: rates A_n at first: ``real`` -(n + 1); ``lin`` -1/2 + i pi n; ``inv`` -1/2 + i N/pi (N / (2n + 1) - 1).
        discretisation: ``zoh`` a = exp(dt A), b = (a - 1) / A; ``bilinear`` a = (1 + dt A/2) / (1 - dt A/2), b = dt / (1 - dt A/2);
            ``euler`` a = 1 + dt A, b = dt, which is stable only where |1 + dt A| <= 1: for ``real`` if dt d_state <= 2, hardly for others.
        form: ``convolution`` with the kernel K_l = Re sum_n C_n a_n^l b_n by FFT, ``recurrence``, or ``auto``: the convolution where
            there is more than one token and no reset. Both give the same numbers, up to rounding.

    Source: Gu, Gupta, Goel and Re 2022, NeurIPS (On the Parameterization and Initialization of Diagonal State Space Models).

    >>> y, state = S4D(16, d_state=8)(torch.randn(1, 10, 16))
    >>> y.shape, state["W"].shape
    (torch.Size([1, 10, 16]), torch.Size([1, 1, 16, 8]))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "lin",
        discretisation: str = "zoh",
        form: str = "auto",
        steps: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        for what, given, known in (
            ("init", init, INITIALISATIONS),
            ("discretisation", discretisation, DISCRETISATIONS),
            ("form", form, FORMS),
        ):
            if given not in known:
                raise SignalError(f"{what} is {given!r}; known: {', '.join(known)}")
        self.d_model, self.d_state = size("d_model", d_model), size("d_state", d_state)
        self.form, self.discretisation = form, discretisation
        self.complex = init != "real"
        if self.complex and d_state % 2:
            raise SignalError(f"d_state is {d_state}, but the complex states of init={init!r} come in pairs; give an even number")
        states = d_state // 2 if self.complex else d_state
        real, imaginary = INITIALISATIONS[init](torch.arange(states, dtype=torch.float32), d_state)
        self.A_log = nn.Parameter((-real).log().repeat(d_model, 1))
        self.A_imag = None if imaginary is None else nn.Parameter(imaginary.repeat(d_model, 1))
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(steps[0]), math.log(steps[1])))
        self.C = nn.Parameter(torch.randn(d_model, d_state) * (0.5**0.5 if self.complex else 1.0))
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.d_model, reset)
        u = single(x)
        a, b = self.discrete(u.dtype)
        c = self._joined(self.C.to(u.dtype)) * (2 if self.complex else 1)
        h = self._joined(u.new_zeros(x.shape[0], 1, self.d_model, self.d_state) if state is None else state["W"]).squeeze(1)
        cut = reset is not None and bool(reset.any())
        if cut and self.form == "convolution":
            raise SignalError("form is 'convolution', which has one kernel for all tokens, but reset marks some; use form='auto'")
        if cut or self.form == "recurrence" or (self.form == "auto" and x.shape[1] == 1):
            y, h = self._recurrence(u, h, a, b, c, reset)
        else:
            y, h = self._convolution(u, h, a, b, c)
        y = F.gelu(y + self.skip.to(u.dtype) * u).to(x.dtype)
        return F.glu(self.out(y), -1), {"W": self._apart(h).unsqueeze(1)}

    def discrete(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """a and b of h_t = a h_{t-1} + b u_t, each (d_model, states), complex for half of d_state states if they are in pairs."""
        A = -self.A_log.to(dtype).exp()
        A = A if self.A_imag is None else torch.complex(A, self.A_imag.to(dtype))
        return DISCRETISATIONS[self.discretisation](A, self.log_dt.to(dtype).exp().unsqueeze(-1))

    def kernel(self, length: int) -> Tensor:
        """K_l of the convolution y_t = sum_l K_l u_{t-l}, (length, d_model)."""
        a, b = self.discrete(self.C.dtype)
        c = self._joined(self.C) * (2 if self.complex else 1)
        return _real(_powers(a, size("length", length))[:-1] * (b * c)).sum(-1)

    def _recurrence(self, u: Tensor, h: Tensor, a: Tensor, b: Tensor, c: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        def run(h: Tensor, u: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
            written = u.unsqueeze(-1) * b
            every = linear_recurrence(a.expand_as(written), written, h, reset)
            return _real(every * c).sum(-1), last(every, h)

        return in_spans(run, (u, reset), h)

    def _convolution(self, u: Tensor, h: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        span = min(max(_NUMBERS_A_SPAN // a.numel(), 16), max(u.shape[1], 1))
        powers = _powers(a, span)
        kernel = _real(powers[:-1] * (b * c)).sum(-1)
        done = []
        for part in u.split(span, 1):
            steps = part.shape[1]
            earlier = _real(torch.einsum("bdn,sdn->bsd", h, powers[1 : steps + 1] * c))
            done.append(_convolved(part, kernel[:steps]) + earlier)
            h = h * powers[steps] + b * torch.einsum("bsd,sdn->bdn", part.to(b.dtype), powers[:steps].flip(0))
        return torch.cat(done, 1), h

    def _joined(self, x: Tensor) -> Tensor:
        """Numbers of state, or of C, as they are computed with: complex if they are in pairs."""
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if self.complex else x

    def _apart(self, h: Tensor) -> Tensor:
        return torch.view_as_real(h).flatten(-2) if self.complex else h

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * self.d_model * self.d_state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, {self.discretisation}"


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _powers(a: Tensor, most: int) -> Tensor:
    """a^0 ... a^most, (most + 1, ...), by doubling: the rows of the Vandermonde matrix."""
    rows = torch.ones_like(a).unsqueeze(0)
    while len(rows) <= most:
        rows = torch.cat([rows, rows * (rows[-1] * a)])
    return rows[: most + 1]


def _convolved(u: Tensor, kernel: Tensor) -> Tensor:
    """The sum over l of kernel_l u_{t-l}, (B, S, D), by FFT of at least twice the length, in which nothing wraps around."""
    steps = u.shape[1]
    if not steps:
        return u
    n = 2 ** (2 * steps - 1).bit_length()
    return torch.fft.irfft(torch.fft.rfft(u, n, 1) * torch.fft.rfft(kernel, n, 0), n, 1)[:, :steps]


class Mamba(nn.Module):
    """Mamba's selective state space layer: a fast weight matrix whose decay is a matrix, too.

        W <- exp(dt_v A_vk) W_vk + (dt_v x_v) B_k,  y = W C + D x,  dt, B and C made from x

    For a delta or a Hebbian rule the decay is a number or a vector of key channels; here every v has steps dt_v of its own, and every
    number of W its own rate A_vk. ``selective_signals`` says which ``decayed_hebb`` that is. The layer is the published one: x and a
    gate z of d_inner = expand d_model channels are projected; x goes through a causal convolution and silu; dt = softplus of a
    projection of low rank; what is read is multiplied by silu(z) and projected back.

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model). The state is W (B, 1, d_inner, d_state) and ``conv``, the last
    inputs of the convolution, (B, conv - 1, d_inner).

    Source: Gu and Dao 2023, arXiv 2312.00752. Published weights go in as in_proj -> project, conv1d -> conv, x_proj -> select,
    dt_proj -> step, A_log -> A_log, D -> skip, out_proj -> out.

    >>> y, state = Mamba(16, d_state=4)(torch.randn(1, 10, 16))
    >>> y.shape, state["W"].shape, state["conv"].shape
    (torch.Size([1, 10, 16]), torch.Size([1, 1, 32, 4]), torch.Size([1, 3, 32]))
    """

    def __init__(self, d_model: int, *, d_state: int = 16, expand: int = 2, conv: int = 4, rank: int | None = None) -> None:
        super().__init__()
        self.d_model, self.d_state = size("d_model", d_model), size("d_state", d_state)
        inner = size("expand", expand) * d_model
        self.d_inner, self.rank = inner, size("rank", -(-d_model // 16) if rank is None else rank)
        self.project = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, size("conv", conv, 2), bias=True)
        self.select = nn.Linear(inner, self.rank + 2 * d_state, bias=False)
        self.step = nn.Linear(self.rank, inner)
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.step.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.d_model, reset)
        u, gate = self.project(x).chunk(2, -1)
        u, conv = self.conv(u, None if state is None else state["conv"], reset=reset)
        u = F.silu(u)
        dt, B, C = self.select(u).split([self.rank, self.d_state, self.d_state], -1)
        dt = F.softplus(single(F.linear(dt, self.step.weight)) + single(self.step.bias))
        u, B, C, A = single(u), single(B), single(C), -single(self.A_log).exp()
        W = None if state is None else state["W"].squeeze(1)
        y, W = selective_scan(x=u, dt=dt, A=A.to(u.dtype), B=B, C=C, state=W, reset=reset)
        y = (y + self.skip.to(u.dtype) * u).to(gate.dtype) * F.silu(gate)
        return self.out(y), {"W": W.unsqueeze(1), "conv": conv}

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * self.d_inner * (self.d_state + self.conv.width - 1)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}"
