"""Recurrent networks whose state is a vector, to compare fast weights with: RNN, GRU and LSTM of torch, and sLSTM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import SignalError
from .inputs import check_sequence, single, size
from .programmer import ShortConvolution

State = dict[str, Tensor]

CELLS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class RecurrentNetwork(nn.Module):
    """One layer of torch's RNN (tanh), GRU or LSTM, and a projection of its state to d_model.

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model). The state is h (B, d_hidden), and c beside it for an LSTM.
    Source: Elman 1990; Cho et al. 2014; Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    >>> y, state = RecurrentNetwork(16, cell="lstm", d_hidden=8)(torch.randn(1, 10, 16))
    >>> y.shape, state["h"].shape, state["c"].shape
    (torch.Size([1, 10, 16]), torch.Size([1, 8]), torch.Size([1, 8]))
    """

    def __init__(self, d_model: int, *, cell: str = "lstm", d_hidden: int | None = None) -> None:
        super().__init__()
        if cell not in CELLS:
            raise SignalError(f"cell is {cell!r}; known: {', '.join(CELLS)}")
        self.d_model, self.d_hidden = size("d_model", d_model), size("d_hidden", d_model if d_hidden is None else d_hidden)
        self.names = ("h", "c") if cell == "lstm" else ("h",)
        self.cell = CELLS[cell](d_model, self.d_hidden, batch_first=True)
        self.out = nn.Linear(self.d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.d_model, reset)
        empty = self.cell.weight_hh_l0.new_zeros(x.shape[0], self.d_hidden)
        memory = tuple(empty if state is None else state[n] for n in self.names)
        starts = [] if reset is None else reset.any(0).nonzero().flatten().tolist()
        done = [x.new_zeros(x.shape[0], 0, self.d_hidden)]
        for begin, end in zip([0, *starts], [*starts, x.shape[1]], strict=True):
            if reset is not None and begin < end:
                memory = tuple(torch.where(reset[:, begin, None], torch.zeros_like(m), m) for m in memory)
            if begin < end:
                y, memory = self._run(x[:, begin:end], memory)
                done.append(y)
        return self.out(torch.cat(done, 1)), dict(zip(self.names, memory, strict=True))

    def _run(self, x: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        before = tuple(m.unsqueeze(0).contiguous() for m in memory)
        y, after = self.cell(x, before if len(before) > 1 else before[0])
        return y, tuple(m.squeeze(0) for m in (after if isinstance(after, tuple) else (after,)))

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * len(self.names) * self.d_hidden


class SLSTM(nn.Module):
    """sLSTM: an LSTM with exponential gates, a normaliser n and a stabiliser m, whose memory mixes within a head.

        i, f, z, o from x and h_{t-1};  m_t = max(log f + m_{t-1}, i),  i' = exp(i - m_t),  f' = exp(log f + m_{t-1} - m_t)
        c_t = f' c_{t-1} + i' tanh(z),  n_t = f' n_{t-1} + i',  h_t = sigmoid(o) c_t / n_t

    log f is logsigmoid(f), or f itself with ``exponential_forget``. Input and forget gates see x through a causal convolution and silu;
    h_{t-1} comes in through a matrix for each head and gate. What is read is normed head by head and projected.

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model). The state is h, c, n and m, each (B, heads, d_hidden / heads), m -inf
    where nothing was read, and ``conv``, the last inputs, (B, conv - 1, d_model).

    Args:
        depth: place of the layer from 0 (first) to 1 (last); biases of forget gates fall from 5 to -7 over a head, ever later with depth.

    Source: Beck et al. 2024, NeurIPS (xLSTM).

    >>> y, state = SLSTM(16, heads=2)(torch.randn(1, 10, 16))
    >>> y.shape, state["c"].shape
    (torch.Size([1, 10, 16]), torch.Size([1, 2, 8]))
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        d_hidden: int | None = None,
        conv: int = 4,
        exponential_forget: bool = False,
        depth: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = size("d_hidden", d_model if d_hidden is None else d_hidden)
        if hidden % size("heads", heads):
            raise SignalError(f"d_hidden = {hidden} is not a multiple of heads = {heads}")
        if not 0 <= depth <= 1:
            raise SignalError(f"depth is {depth}, expected 0 (the first layer) to 1 (the last)")
        self.d_model, self.heads, self.d_hidden = size("d_model", d_model), heads, hidden
        self.exponential_forget, width = exponential_forget, hidden // heads
        self.conv = ShortConvolution(d_model, size("conv", conv, 2))
        self.gates = nn.Linear(d_model, 2 * hidden, bias=False)  # i and f
        self.inputs = nn.Linear(d_model, 2 * hidden, bias=False)  # z and o
        self.recurrent = nn.Parameter(torch.zeros(heads, width, 4 * width))
        place = torch.arange(width) / max(width - 1, 1)
        bias = torch.zeros(4, heads, width)
        bias[1] = 5 - 12 * place ** (0.3 + 1.3 * depth)
        self.bias = nn.Parameter(bias.flatten())
        self.norm = nn.GroupNorm(heads, hidden)
        self.out = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.d_model, reset)
        short, conv = self.conv(x, None if state is None else state["conv"], reset=reset)
        given = single(torch.cat([self.gates(F.silu(short)), self.inputs(x)], -1)) + single(self.bias)
        given = given.unflatten(-1, (4, self.heads, -1))
        empty = self._empty(given)
        h, c, n, m = empty if state is None else (state[name] for name in ("h", "c", "n", "m"))
        R = self.recurrent.to(given.dtype)
        every = []
        for t, token in enumerate(given.unbind(1)):
            if reset is not None:
                at = reset[:, t, None, None]
                h, c, n, m = (torch.where(at, nothing, s) for nothing, s in zip(empty, (h, c, n, m), strict=True))
            mixed = torch.einsum("bhd,hde->bhe", h, R).unflatten(-1, (4, -1))
            h, c, n, m = self._cell(token + mixed.transpose(1, 2), c, n, m)
            every.append(h)
        y = torch.stack(every, 1).flatten(2) if every else x.new_zeros(x.shape[0], 0, self.d_hidden)
        y = self.norm(y.flatten(0, 1).to(x.dtype)).unflatten(0, x.shape[:2])
        return self.out(y), {"h": h, "c": c, "n": n, "m": m, "conv": conv}

    def _cell(self, raw: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, f, z, o = raw.unbind(1)
        kept = m + (f if self.exponential_forget else F.logsigmoid(f))
        m = torch.maximum(kept, i)
        i, f = (i - m).exp(), (kept - m).exp()
        c, n = f * c + i * z.tanh(), f * n + i
        return o.sigmoid() * c / n, c, n, m

    def _empty(self, given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zero = given.new_zeros(given.shape[0], self.heads, self.d_hidden // self.heads)
        return zero, zero, zero, torch.full_like(zero, -torch.inf)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * (4 * self.d_hidden + (self.conv.width - 1) * self.d_model)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, heads={self.heads}, d_hidden={self.d_hidden}"
