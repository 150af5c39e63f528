"""Log-linear attention: a rule whose past is kept in O(log T) matrices, the older the coarser, read with weights that follow the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.scan import attention_matrix, scan
from ..language.errors import FormError, SignalError
from ..language.rule import Rule
from ..rules.hebb import decayed_hebb
from .inputs import check_sequence, single, size
from .layer import FastWeightLayer

State = dict[str, Tensor]

_TOKENS_TOGETHER = 32  # of all levels that are one scan: few tokens cost as much as one


class LogLinearOutput(NamedTuple):
    """``y`` (B, T, H, V), the matrices (B, levels - 1, H, V, K) and how many tokens of its document each row has read, (B,) int64."""

    y: Tensor
    state: Tensor
    position: Tensor


def fenwick_levels(tokens: int, device: torch.device | None = None) -> Tensor:
    """The level at which token t keeps token s <= t, (tokens, tokens) int64: the length in bits of t xor s.

    Level 0 is the token itself, level l a block of 2^(l-1) tokens; the blocks of t are those of the binary digits of t. Merging
    levels whenever they are full (Fenwick 1994) leads to the same levels.

    >>> fenwick_levels(4).tolist()
    [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    """
    t = torch.arange(tokens, device=device)
    return torch.frexp((t[:, None] ^ t[None, :]).double()).exponent.long()


def log_linear_matrix(rule: Rule, *, weights: Tensor, **signals: Tensor) -> Tensor:
    """The matrix (B, H, T, T) with y = matrix v that log-linear attention applies: A of the rule times the weights of the levels.

    ``weights`` (B, T, H, levels), the signals those of the rule but ``v``. This is the parallel form, and for looking at: cubic in T.

    >>> k, lam = torch.ones(1, 3, 1, 1), torch.tensor([1.0, 0.5, 0.25]).expand(1, 3, 1, 3)
    >>> log_linear_matrix(decayed_hebb, weights=lam, q=k, k=k, g=0 * k[..., 0])[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.25, 1.0]]
    """
    A = attention_matrix(rule, **signals)
    levels = fenwick_levels(A.shape[-1], A.device).clamp(max=weights.shape[-1] - 1)
    return A * weights.transpose(1, 2).gather(-1, levels.expand_as(A))


def log_linear(
    rule: Rule,
    *,
    weights: Tensor,
    state: Tensor | None = None,
    position: Tensor | None = None,
    reset: Tensor | None = None,
    **signals: Tensor,
) -> LogLinearOutput:
    """y_t = sum over l of lambda_t^(l) W_t^(l) q_t, W^(l) the memory of the l-th block of a Fenwick tree over the past of t.

    Each W^(l) is what the rule makes of the tokens of its block, carried on from there by the decays and erasures of all later tokens.
    Level 0 is the token itself, level l < levels - 1 a block of 2^(l-1) tokens. **The number of levels is fixed**: the last holds
    everything older, so that the tree is the full one for up to 2^(levels - 1) tokens, and after that its oldest parts are one matrix.
    With equal weights this is the rule itself.

    How it runs: level l is a ``scan`` of its own, emptied at every 2^l-th token, which writes in the first half of that block of 2^l
    and is read in the second; with y of the whole, which no level empties, y = lambda_last y_whole + sum_l (lambda_l - lambda_last) y_l.
    So it takes O(T log T), on the kernels of any rule that is linear in v, may be cut anywhere, and never divides by a decay.

    Args:
        rule: affine in W and linear in v, such as ``decayed_hebb``, ``stepped_hebb``, ``delta``, ``gated_delta``.
        weights: lambda, (B, T, H, levels), at least 2 levels.
        state, position: as returned for the tokens before. ``state[:, l - 1]`` is the scan of level l, ``state[:, -1]`` the whole.
        reset: bool (B, T), the past is empty before these tokens.
        signals: those of the rule, (B, T, H, ...).

    Source: Guo et al. 2025, arXiv 2506.04761 (Log-Linear Attention).

    >>> k = torch.ones(1, 3, 1, 1)
    >>> lam = torch.tensor([1.0, 0.5, 0.25]).expand(1, 3, 1, 3)
    >>> log_linear(decayed_hebb, weights=lam, q=k, k=k, v=k, g=0 * k[..., 0]).y.flatten().tolist()
    [1.0, 1.5, 1.5]
    """
    v = _values(rule, signals)
    if weights.ndim != 4 or weights.shape[:3] != v.shape[:3] or weights.shape[-1] < 2:
        raise SignalError(f"weights are {tuple(weights.shape)}, expected (B, T, H, levels) = {(*v.shape[:3], '2 or more')}")
    rest = {n: x for n, x in signals.items() if n != "v"}
    weights = weights.to(v.dtype)
    levels = weights.shape[-1]
    position, end = _positions(v, position, reset)
    before = [None] * (levels - 1) if state is None else list(state.unbind(1))

    whole = scan(rule, v=v, **rest, state=before[-1], reset=reset)
    last, after = weights[..., -1:], [whole.state] * (levels - 1)
    y = last * whole.y + (weights[..., :1] - last) * _fresh(rule, v, rest)
    longest = int(position.max()) if position.numel() else 0
    used = range(1, min(longest.bit_length(), levels - 2) + 1)  # above, a block has no second half yet: its scan is the whole
    together = max(_TOKENS_TOGETHER // max(v.shape[1], 1), 1)
    for group in (used[i : i + together] for i in range(0, len(used), together)):
        reads, states = _scans(rule, group, position, v, rest, [before[level - 1] for level in group])
        for level, read, W in zip(group, reads, states, strict=True):
            y = y + (weights[..., level : level + 1] - last) * read
            after[level - 1] = W
    return LogLinearOutput(y, torch.stack(after, 1), end)


def _scans(
    rule: Rule, levels: range, position: Tensor, v: Tensor, rest: Mapping[str, Tensor], before: list[Tensor | None]
) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    """What is read (B, T, H, V) in the second halves of blocks of 2^level, zero in the first, and the states, for each level."""
    block = 2 ** torch.tensor(levels, device=v.device).reshape(-1, 1, 1)
    second = position % block >= block // 2  # (levels, B, T)
    state = None if before[0] is None else torch.cat([W for W in before if W is not None])
    first = torch.where(second[..., None, None], 0, v)
    rows = {n: x.expand(len(levels), *x.shape).flatten(0, 1) for n, x in rest.items()}
    y, W = scan(rule, v=first.flatten(0, 1), **rows, state=state, reset=(position % block == 0).flatten(0, 1))
    read = torch.where(second[..., None, None], y.unflatten(0, (len(levels), -1)), 0)
    return read, W.unflatten(0, (len(levels), -1))


def _values(rule: Rule, signals: Mapping[str, Tensor]) -> Tensor:
    given = rule.signals.get("v")
    apart = [n for n, s in rule.signals.items() if n != "v" and "value" in s.role.spaces]
    if given is None or given.role.name != "Value" or given.sets or len(rule.states) > 1 or rule.program.transposed or apart:
        raise FormError(
            f"the past of rule {rule.name!r} cannot be read level by level: that takes a rule of W alone, affine in it and linear in one "
            "value v whose channels it treats alike, such as decayed_hebb or gated_delta"
        )
    if "v" not in signals:
        raise SignalError(f"{rule.name}: missing signal 'v'")
    return signals["v"]


def _positions(v: Tensor, start: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many tokens of its document come before each token, (B, T), and before the next one, (B,)."""
    B, T = v.shape[:2]
    start = torch.zeros(B, dtype=torch.int64, device=v.device) if start is None else start
    index = torch.arange(T, device=v.device).expand(B, T)
    position = index + start.unsqueeze(1)
    if reset is not None:
        begun = torch.where(reset, index, -1).cummax(1).values if T else index
        position = torch.where(begun >= 0, index - begun, position)
    return position, position[:, -1] + 1 if T else start


def _fresh(rule: Rule, v: Tensor, rest: Mapping[str, Tensor]) -> Tensor:
    """What each token alone writes and reads: a number, since the rule is linear in v, times its value."""
    every = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device)
    return scan(rule, v=torch.ones_like(v[..., :1]), **rest, reset=every).y * v


class LogLinear(nn.Module):
    """A fast weight layer whose memory is log-linear: O(log T) matrices a head, read with weights lambda = softplus(w x + b).

    At first all weights are near 1, where the layer is that of its rule. ``y, state = layer(x, state, reset)``, x and y
    (B, T, d_model). The state is W (B, levels - 1, heads, d_value, d_key) and ``position``, (B,) int64, beside the last inputs of the
    short convolution. See ``log_linear`` for what the levels are: with 16 of them 2^15 tokens are told apart.

    Args:
        rule: as for ``log_linear``: ``stepped_hebb`` (Mamba-2) or ``gated_delta`` in the paper.
        heads, d_key, d_value, options: those of ``FastWeightLayer`` and its programmer, but for ``rotary``.
        levels: how many weights, at least 2.

    Source: Guo et al. 2025, arXiv 2506.04761.

    >>> y, state = LogLinear(32, heads=2, levels=5)(torch.randn(1, 10, 32))
    >>> y.shape, state["W"].shape, state["position"].tolist()
    (torch.Size([1, 10, 32]), torch.Size([1, 4, 2, 16, 16]), [10])
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        levels: int = 12,
        rule: Rule = decayed_hebb,
        **options: object,
    ) -> None:
        super().__init__()
        if options.get("rotary"):
            raise SignalError("rotary is not an option of LogLinear, whose tokens know how old they are by their level")
        self.d_model, self.levels = size("d_model", d_model), size("levels", levels, 2)
        self.memory = FastWeightLayer(rule, d_model, heads=heads, d_key=d_key, d_value=d_value, **options)  # type: ignore[arg-type]
        self.weigh = nn.Linear(d_model, heads * levels)
        nn.init.constant_(self.weigh.bias, 0.5413248546129181)  # log(e - 1): softplus of this is 1

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.d_model, reset)
        memory = self.memory
        before = None if state is None else state.get("conv")
        signals, conv = memory.programmer(x, before) if reset is None else memory.programmer(x, before, reset)
        weights = F.softplus(single(self.weigh(x))).unflatten(-1, (memory.heads, self.levels))
        past = {} if state is None else {"state": state["W"], "position": state["position"]}
        y, W, position = log_linear(memory.rule, weights=weights, **past, reset=reset, **signals)
        new = {"W": W, "position": position} | ({} if conv is None else {"conv": conv})
        if memory.skip is not None:
            y = y + memory.skip.to(y.dtype).unsqueeze(-1) * signals["v"]
        return memory.out(memory._finish(x, y.flatten(2).to(x.dtype))), new

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        matrix = 4 * self.memory.heads * self.memory.d_value * self.memory.d_feature
        return self.memory.state_bytes(tokens) + (self.levels - 2) * matrix + 8

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
