"""Softmax attention with a key-value cache, whole or in a sliding window: the baseline beside fast weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import SignalError

State = dict[str, Tensor]


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions; ``window`` is how many tokens back it looks, itself included.

    ``y, state = layer(x, state)``, x and y (B, T, d_model). The state is the cache: keys and values (B, heads, past, d_head) and
    the number of tokens so far. Without a window it grows with every token. Tokens do not see past those marked in ``reset``, bool
    (B, T), where documents begin; the state then says which document a kept key is of.

    >>> layer = SoftmaxAttention(32, heads=2, window=4)
    >>> y, state = layer(torch.randn(1, 10, 32))
    >>> y.shape, state["k"].shape
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 3, 16]))
    """

    def __init__(self, d_model: int, *, heads: int = 4, window: int | None = None) -> None:
        super().__init__()
        if d_model % (2 * heads):
            raise SignalError(f"d_model = {d_model} is not a multiple of 2 * heads = {2 * heads}, which rotary positions need")
        if window is not None and window < 1:
            raise SignalError(f"window is {window}, expected at least 1 token")
        self.d_model, self.heads, self.window = d_model, heads, window
        self.project = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        steps = x.shape[1]
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        start = torch.zeros((), dtype=torch.int64) if state is None else state["position"]
        positions = torch.arange(steps, device=x.device) + start.to(x.device)
        q, k = rotate(q, positions), rotate(k, positions)
        past = 0
        if state is not None:
            past = state["k"].shape[2]
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        document = self._documents(state, reset, x, past)
        if document is None and past == 0 and (self.window is None or steps <= self.window):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = self._mask(steps, past, x.device)
            if document is not None:
                mask = mask & (document[:, past:, None] == document[:, None, :]).unsqueeze(1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        kept = k.shape[2] if self.window is None else min(self.window - 1, k.shape[2])
        new = {"k": k[:, :, k.shape[2] - kept :], "v": v[:, :, v.shape[2] - kept :], "position": start + steps}
        if document is not None:
            new["document"] = document[:, document.shape[1] - kept :]
        return self.out(y.transpose(1, 2).flatten(2)), new

    @staticmethod
    def _documents(state: Mapping[str, Tensor] | None, reset: Tensor | None, x: Tensor, past: int) -> Tensor | None:
        """The number of the document that every key is of, (B, past + T); None as long as there is one."""
        if reset is None and (state is None or "document" not in state):
            return None
        B, T = x.shape[:2]
        before = torch.zeros(B, past, dtype=torch.int64, device=x.device) if state is None or "document" not in state else state["document"]
        begun = torch.zeros(B, T, dtype=torch.int64, device=x.device) if reset is None else reset.to(torch.int64).cumsum(1)
        return torch.cat([before, begun + (before[:, -1:] if past else 0)], 1)

    def _mask(self, steps: int, past: int, device: torch.device) -> Tensor:
        back = (torch.arange(steps, device=device) + past)[:, None] - torch.arange(past + steps, device=device)[None, :]
        return (back >= 0) if self.window is None else (back >= 0) & (back < self.window)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the cache for one sequence of that many tokens, in float32."""
        kept = tokens if self.window is None else min(self.window - 1, tokens)
        return 8 * kept * self.d_model + 8

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, heads={self.heads}" + (f", window={self.window}" if self.window else "")


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions (N,) or (B, 1, N) of x (B, H, N, d): channels (i, i + d/2) turned by position * base^(-2i/d). Su et al. 2021."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions.double()[..., None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
