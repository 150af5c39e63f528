"""Slot memories: two linear memories of m slots with a softmax between them. The first is asked which slot, the second what is in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.scan import Output, scan
from ..language.errors import SignalError
from ..rules.hebb import decayed_hebb, hebb
from .inputs import check_sequence, single, size
from .norms import RMSNorm

State = dict[str, Tensor]

_SLOT_DECAY = decayed_hebb.T  # of the slots of a memory whose values they are


def slot_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float = 1.0,
    state: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
) -> Output:
    """K <- diag(a) K + s k^T;  V <- V diag(a) + v s^T;  y = V softmax(scale K q), a = exp(g) a decay for each slot, or none.

    Two scans: K is written by Hebb's rule with the slots as values, V with the slots as keys.

    Args:
        q, k, v: (B, T, H, .), the query, and what is written.
        s: (B, T, H, m), how much of it goes into each of the m slots.
        g: (B, T, H, m), the log of the slots' decay.
        state: K (B, H, m, dk) and V (B, H, dv, m) before the first token; zero if not given.
        reset: bool (B, T), both are zero before these tokens.

    Returns y (B, T, H, dv), and K and V. Source: Peng et al. 2022, ACL (ABC); Zhang et al. 2024, NeurIPS (GSA).

    >>> one = torch.ones(1, 1, 1, 2)
    >>> slot_attention(q=one, k=one, v=torch.tensor([[[[3.0]]]]), s=torch.tensor([[[[1.0, 0.0]]]])).y.item()  # 3 / (1 + exp(-2))
    2.6423912048339844
    """
    keys, values = (None, None) if state is None else state
    if g is None:
        found, keys = scan(hebb, q=q, k=k, v=s, state=keys, reset=reset)
        y, values = scan(hebb, q=(scale * found).softmax(-1), k=s, v=v, state=values, reset=reset)
    else:
        found, keys = scan(_SLOT_DECAY, q=q, k=k, v=s, g=g, state=keys, reset=reset)
        y, values = scan(decayed_hebb, q=(scale * found).softmax(-1), k=s, v=v, g=g, state=values, reset=reset)
    return Output(y, (keys, values))


class _Projections(nn.Module):
    """q, k, v of heads and a number a slot, from x; the sizes that both layers have."""

    def __init__(self, d_model: int, heads: int, slots: int, d_key: int | None, d_value: int | None) -> None:
        super().__init__()
        if (d_key is None or d_value is None) and d_model % size("heads", heads):
            raise SignalError(f"d_model = {d_model} is not a multiple of heads = {heads}; give d_key and d_value, or other heads")
        self.d_model, self.heads, self.slots = size("d_model", d_model), heads, size("slots", slots)
        self.d_key, self.d_value = d_key or d_model // heads, d_value or d_model // heads
        self.sizes = [self.d_key, self.d_key, self.d_value, slots]
        self.project = nn.Linear(d_model, heads * sum(self.sizes), bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        parts = self.project(x).split([self.heads * n for n in self.sizes], -1)
        return [part.unflatten(-1, (self.heads, -1)) for part in parts]

    def numbers(self) -> int:
        """Of both memories."""
        return self.heads * self.slots * (self.d_key + self.d_value)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, slots={self.slots}, d_key={self.d_key}, d_value={self.d_value}"


class GatedSlotAttention(nn.Module):
    """Gated slot attention: every slot forgets at its own rate a, and takes in as much as it forgets, s = 1 - a.

    q, k and v are silu of projections, a = sigmoid(w x)^(1/temper), what is read is normed after a silu and projected back.
    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model); the state is K (B, heads, slots, d_key) and V (B, heads, d_value,
    slots). Source: Zhang et al. 2024, NeurIPS (Gated Slot Attention; temper = 8).

    >>> y, state = GatedSlotAttention(32, heads=2, slots=8)(torch.randn(1, 10, 32))
    >>> y.shape, state["K"].shape, state["V"].shape
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 8, 16]), torch.Size([1, 2, 16, 8]))
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        slots: int = 64,
        d_key: int | None = None,
        d_value: int | None = None,
        temper: float = 8.0,
    ) -> None:
        super().__init__()
        if not temper > 0:
            raise SignalError(f"temper is {temper}, expected a number above 0")
        self.temper = temper
        self.signals = _Projections(d_model, heads, slots, d_key, d_value)
        self.norm = RMSNorm(heads * self.signals.d_value)
        self.out = nn.Linear(heads * self.signals.d_value, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.signals.d_model, reset)
        q, k, v, z = self.signals(x)
        g = F.logsigmoid(single(z)) / self.temper
        memory = None if state is None else (state["K"], state["V"])
        y, (K, V) = slot_attention(q=F.silu(q), k=F.silu(k), v=F.silu(v), s=(-torch.expm1(g)).to(v.dtype), g=g, state=memory, reset=reset)
        return self.out(self.norm(F.silu(y.flatten(2)).to(x.dtype))), {"K": K, "V": V}

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * self.signals.numbers()


class ABC(nn.Module):
    """Attention with bounded memory: x_i is written into m slots with weights phi_i = exp(z_i) / sum over j <= i of exp(z_j), z = w x.

    So a slot takes in less and less, and never forgets; y = V softmax(K q / sqrt(d_key)). With ``average`` a slot is the average of
    all tokens so far weighted by exp(z), K_t = sum_i exp(z_i) k_i / sum_j<=t exp(z_j): each new phi then pushes out as much as it
    brings in, and the layer is gated slot attention with the decay 1 - phi. (Public code differs in this point.)

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model); the state is K (B, heads, slots, d_key), V (B, heads, d_value, slots)
    and z (B, heads, slots), the log of the sum, -inf where nothing was written. Source: Peng et al. 2022, ACL (ABC with learned control).

    >>> y, state = ABC(32, heads=2, slots=8)(torch.randn(1, 10, 32))
    >>> y.shape, state["z"].shape
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 8]))
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        slots: int = 64,
        d_key: int | None = None,
        d_value: int | None = None,
        average: bool = False,
    ) -> None:
        super().__init__()
        self.average = average
        self.signals = _Projections(d_model, heads, slots, d_key, d_value)
        self.out = nn.Linear(heads * self.signals.d_value, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.signals.d_model, reset)
        q, k, v, z = self.signals(x)
        z = single(z)
        start = z.new_full((x.shape[0], *z.shape[2:]), -torch.inf) if state is None else state["z"]
        total = log_sums(z, start, reset)
        memory = None if state is None else (state["K"], state["V"])
        s, g = (z - total).exp().to(v.dtype), self._decay(total, start, reset) if self.average else None
        y, (K, V) = slot_attention(q=q, k=k, v=v, s=s, g=g, scale=self.signals.d_key**-0.5, state=memory, reset=reset)
        return self.out(y.flatten(2).to(x.dtype)), {"K": K, "V": V, "z": total[:, -1] if x.shape[1] else start}

    @staticmethod
    def _decay(total: Tensor, start: Tensor, reset: Tensor | None) -> Tensor:
        """log of what is left of a slot: the sum before a token over the sum after it."""
        before = torch.cat([start.unsqueeze(1), total[:, :-1]], 1)[:, : total.shape[1]]
        g = (before - total).clamp(max=0)
        return g if reset is None else g.masked_fill(reset[..., None, None], 0)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        return 4 * (self.signals.numbers() + self.signals.heads * self.signals.slots)

    def extra_repr(self) -> str:
        return f"average={self.average}"


def log_sums(z: Tensor, start: Tensor, reset: Tensor | None = None) -> Tensor:
    """log of exp(start) + the sum of exp(z_j) over j <= t, (B, T, ...), since the last token marked in ``reset``. By doubling.

    >>> log_sums(torch.zeros(1, 3, 1), torch.full((1, 1), -torch.inf)).exp().flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    B, T = z.shape[:2]
    document = torch.zeros(B, T, dtype=torch.int64, device=z.device) if reset is None else reset.to(torch.int64).cumsum(1)
    shape = (B, T, *(1,) * (z.ndim - 2))
    total, reach = z, 1
    while reach < T:
        same = document == document.roll(reach, 1)
        same[:, :reach] = False
        total = torch.where(same.reshape(shape), torch.logaddexp(total, total.roll(reach, 1)), total)
        reach *= 2
    return torch.where((document == 0).reshape(shape), torch.logaddexp(total, start.unsqueeze(1)), total)
