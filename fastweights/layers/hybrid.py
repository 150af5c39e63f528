"""One layer with two memories: softmax attention to the last tokens, and fast weights for what came before or for everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.gated_norm import unit_length
from ..engine.scan import scan
from ..language.errors import SignalError
from ..language.rule import Rule
from .attention import rotate
from .programmer import Programmer

State = dict[str, Tensor]
KINDS = ("synchronous", "delayed_stream", "delayed_chunk")
MIXES = ("sum", "scalar", "vector")
_QUEUE = "queue."


class HybridAttention(nn.Module):
    """Softmax attention within a window and a fast weight memory, of the same queries, keys and values.

    ``kind`` says when a token enters the fast weights: at once (``synchronous``); when it leaves the window (``delayed_stream``); with
    its whole chunk of ``window`` tokens, when that is full and attention begins another (``delayed_chunk``). The fast weights see
    silu of queries and keys, of length 1; attention sees them as projected, turned by their positions. ``mix``: the sum of what both
    read, or each times a sigmoid of x, a number a head (``scalar``) or a channel (``vector``).

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model). The state has W (B, heads, d_head, d_head), what the last ``window``
    tokens brought, their positions (-1: there is none) and documents. Source: Irie, Yau and Gershman 2025.

    >>> from fastweights import rules
    >>> layer = HybridAttention(rules.delta, 32, heads=2, window=4)
    >>> y, state = layer(torch.randn(1, 10, 32))
    >>> y.shape, state["W"].shape
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 16, 16]))
    """

    def __init__(
        self,
        rule: Rule,
        d_model: int,
        *,
        heads: int = 4,
        window: int = 64,
        kind: str = "synchronous",
        mix: str = "scalar",
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        if d_model % (2 * heads):
            raise SignalError(f"d_model = {d_model} is not a multiple of 2 * heads = {2 * heads}, which rotary positions need")
        for what, given, known in (("kind", kind, KINDS), ("mix", mix, MIXES)):
            if given not in known:
                raise SignalError(f"{what} is {given!r}; known: {', '.join(known)}")
        if window < 1:
            raise SignalError(f"window is {window}, expected at least 1 token")
        if len(rule.states) > 1 or not {"q", "k", "v"} <= rule.signals.keys():
            raise SignalError(f"a hybrid needs a rule of one state with q, k and v, and {rule.name} has {', '.join(rule.signals)}")
        if rule.signals["k"].sets is not None:
            raise SignalError(f"a hybrid needs a rule with one key a token, which attention shares, and {rule.name} has several")
        self.rule, self.d_model, self.heads, self.window, self.kind, self.mix = rule, d_model, heads, window, kind, mix
        size = d_model // heads
        self.programmer = Programmer(
            rule, d_model, heads=heads, d_key=size, d_value=size, conv=1, feature_map="identity", norm="none", values="identity",
            negative_eigenvalues=negative_eigenvalues,
        )  # fmt: skip
        self.shares = None if mix == "sum" else nn.Linear(d_model, 2 * heads * (size if mix == "vector" else 1))
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        T = x.shape[1]
        fresh, _ = self.programmer(x)
        state = self._empty(x, fresh) if state is None else state
        begins = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if reset is None else reset
        document = torch.cat([state["document"], state["document"][:, -1:] + begins.cumsum(1)], 1)
        place = torch.cat([state["place"], _places(state["place"][:, -1], begins)], 1)
        every = {n: torch.cat([state[_QUEUE + n].to(z.dtype), z], 1) for n, z in fresh.items() if n != "q"}
        attended = self._attend(fresh["q"], every, place, document)
        read, W = self._read(fresh, every, place, document, state["W"], begins)
        y = self._mixed(x, attended, read.to(attended.dtype))
        new = {"W": W, "document": document[:, T:], "place": place[:, T:]}
        return self.out(y.flatten(2)), new | {_QUEUE + n: z[:, T:] for n, z in every.items()}

    def _empty(self, x: Tensor, fresh: Mapping[str, Tensor]) -> State:
        B, S, size = x.shape[0], self.window, self.d_model // self.heads
        made = {_QUEUE + n: z.new_zeros(B, S, *z.shape[2:]) for n, z in fresh.items() if n != "q"}
        none = torch.full((B, S), -1, dtype=torch.int64, device=x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return made | {"W": x.new_zeros(B, self.heads, size, size, dtype=dtype), "document": none + 1, "place": none}

    def _attend(self, q: Tensor, every: Mapping[str, Tensor], place: Tensor, document: Tensor) -> Tensor:
        """Softmax attention of the new tokens to those of the window (or of the chunk), (B, T, H, V)."""
        T, S = q.shape[1], self.window
        k, v = every["k"].transpose(1, 2), every["v"].transpose(1, 2)
        at = place[:, None]
        q, k = rotate(q.transpose(1, 2), at[..., S:]), rotate(k, at)
        back = place[:, S:, None] - place[:, None, :]
        seen = (back >= 0) & (place >= 0)[:, None] & (document[:, S:, None] == document[:, None, :])
        if self.kind == "delayed_chunk":
            seen = seen & (place[:, S:, None] // S == place[:, None, :] // S)
        else:
            seen = seen & (back < S)
        if T == 0:
            return q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)

    def _read(
        self, fresh: Mapping[str, Tensor], every: Mapping[str, Tensor], place: Tensor, document: Tensor, W: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the fast weights read for the new tokens, (B, T, H, V), and what they are after them."""
        S, T = self.window, reset.shape[1]
        q = unit_length(F.silu(fresh["q"]))
        if self.kind == "synchronous":
            return scan(self.rule, q=q, **self._written({n: z[:, S:] for n, z in every.items()}), state=W, reset=reset)
        if self.kind == "delayed_stream":
            left = (document[:, :T] == document[:, S:]) & (place[:, :T] >= 0)
            return scan(self.rule, q=q, **self._written({n: z[:, :T] for n, z in every.items()}, left), state=W, reset=reset)
        return self._read_chunks(q, every, place, document, W, reset)

    def _read_chunks(
        self, q: Tensor, every: Mapping[str, Tensor], place: Tensor, document: Tensor, W: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every token reads, then all that it ends a chunk of is written: one scan over reads and writes, each in its place."""
        S, (B, T) = self.window, reset.shape
        chunk = place // S
        full = (place % S == S - 1).to(torch.int64)
        # the chunk of a token is written behind its last token, which must be a new one of the same document
        ends = torch.arange(S + T, device=q.device) - place % S + S - 1
        last = ends.clamp(max=S + T - 1)
        whole = (place >= 0) & (ends < S + T) & (ends >= S) & (chunk.gather(1, last) == chunk) & (document.gather(1, last) == document)
        whole &= full.gather(1, last).bool()
        reads = 2 * torch.arange(S, S + T, device=q.device).expand(B, T)
        order = torch.cat([reads, 2 * ends + 1], 1).argsort(dim=1, stable=True)
        written = self._written(every, whole)
        events = {n: torch.cat([z.new_zeros(B, T, *z.shape[2:]), z], 1) for n, z in written.items()}
        events["q"] = torch.cat([q, q.new_zeros(B, S + T, *q.shape[2:])], 1)
        begins = torch.cat([reset, reset.new_zeros(B, S + T)], 1)
        sorted_events = {n: z.gather(1, _like(order, z)) for n, z in events.items()}
        y, W = scan(self.rule, **sorted_events, state=W, reset=begins.gather(1, order))
        back = order.argsort(1)[:, :T]
        return y.gather(1, _like(back, y)), W

    def _written(self, signals: Mapping[str, Tensor], counts: Tensor | None = None) -> dict[str, Tensor]:
        """What the fast weights are given of tokens; those that do not count change nothing."""
        made = dict(signals) | {"k": unit_length(F.silu(signals["k"]))}
        if counts is None:
            return made
        return {n: torch.where(counts.view(*counts.shape, *(1,) * (z.ndim - 2)), z, torch.zeros_like(z)) for n, z in made.items()}

    def _mixed(self, x: Tensor, attended: Tensor, read: Tensor) -> Tensor:
        if self.shares is None:
            return attended + read
        a, b = self.shares(x).sigmoid().unflatten(-1, (2, self.heads, -1)).unbind(2)
        return a * attended + b * read

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence: the same for any number of tokens."""
        del tokens
        size = self.d_model // self.heads
        queue = sum(n for name, n in self.programmer.sizes.items() if name != "q")
        return 4 * (self.heads * size**2 + self.window * queue) + 16 * self.window

    def extra_repr(self) -> str:
        return f"{self.rule.name}, d_model={self.d_model}, heads={self.heads}, window={self.window}, {self.kind}, mix={self.mix}"


def _places(last: Tensor, begins: Tensor) -> Tensor:
    """Positions in their documents of new tokens (B, T), after the position ``last`` (B,)."""
    count = torch.arange(1, begins.shape[1] + 1, device=begins.device).expand(begins.shape)
    start = torch.where(begins, count, torch.zeros_like(count)).cummax(1).values
    return torch.where(start > 0, count - start, last[:, None] + count)


def _like(order: Tensor, z: Tensor) -> Tensor:
    return order.view(*order.shape, *(1,) * (z.ndim - 2)).expand(*order.shape, *z.shape[2:])
