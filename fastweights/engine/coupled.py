"""The chunk form of rules whose matrices move together (language/couple.py), in torch, on any device.

With Phi(t, s) = P_t ... P_{s+1} and Z_0 the matrices before a chunk,

    e_t = u_t + (c_t Phi(t-1, 0)) Z_0 k_t + sum_{s < t} [c_t Phi(t-1, s) b_s] (k_s . k_t) e_s
    y_t = (Phi(t, 0)_1) Z_0 q_t + sum_{s <= t} [Phi(t, s) b_s]_1 (k_s . q_t) e_s

The brackets are numbers: m x m products for all chunks at once, a step a token of a chunk. The errors are a triangular system, as in the
delta rule; only Z_0 goes from chunk to chunk. Nothing is divided, so strong forgetting is safe.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.couple import Coupled
from ..language.evaluate import evaluate
from ..language.expr import Expr
from .inputs import Inputs


def coupled(form: Coupled, leaves: dict[str, Expr], given: Inputs, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs (B, T, H, V) and the final states, ``size`` tokens a chunk."""
    B, T, H, m = given.B, given.T, given.H, len(given.states)
    if T == 0:
        return given.empty(), given.states
    signals = {leaves[n]: x.to(given.dtype) for n, x in given.signals.items()}
    values = evaluate(form.expressions(), signals, 3)

    def chunks(e: Expr | None, *shape: int, fill: float = 0.0) -> Tensor:
        """(B, H, chunks, size, ...), padded with what changes nothing."""
        x = next(iter(signals.values())).new_zeros((1, 1, 1, *shape)) if e is None else values[e]
        x = x.expand(B, T, *x.shape[2:]).repeat_interleave(H // x.shape[2], 2)
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -T % size), value=fill)
        return x.transpose(1, 2).unflatten(2, (-1, size))

    P = torch.stack([torch.stack([chunks(e, fill=float(i == j)) for j, e in enumerate(row)], -1) for i, row in enumerate(form.mix)], -2)
    b, c = (torch.stack([chunks(e) for e in numbers], -1) for numbers in (form.write, form.feedback))
    u, k, q = chunks(form.error, given.V), chunks(form.key, given.K), chunks(form.query, given.K)
    if given.reset is not None:
        kept = F.pad(~given.reset, (0, -T % size), value=True)[:, None].unflatten(2, (-1, size)).to(P.dtype)
        P, c = P * kept[..., None, None], c * kept[..., None]
    within, read, from_start, read_start, ends, end = _numbers(P, b, c)
    # the system for the errors, solved once for every chunk
    L = torch.eye(size, dtype=P.dtype, device=P.device) - within * (k @ k.mT)
    solved = torch.linalg.solve_triangular(
        L, torch.cat([u, *(from_start[..., j, None] * k for j in range(m))], -1), upper=False, unitriangular=True
    )
    e_u, e_k = solved[..., : given.V], solved[..., given.V :].unflatten(-1, (m, -1))
    Z = torch.stack(given.states, 2)  # (B, H, m, V, K)
    A = read * (q @ k.mT)
    out = []
    for n in range(P.shape[2]):
        e = e_u[:, :, n] + torch.einsum("bhtjk,bhjvk->bhtv", e_k[:, :, n], Z)
        y = torch.einsum("bhtj,bhjvk,bhtk->bhtv", read_start[:, :, n], Z, q[:, :, n]) + A[:, :, n] @ e
        out.append(y)
        Z = torch.einsum("bhij,bhjvk->bhivk", end[:, :, n], Z) + torch.einsum("bhsi,bhsv,bhsk->bhivk", ends[:, :, n], e, k[:, :, n])
    y = torch.stack(out, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)
    return y, Z.unbind(2)


def _numbers(P: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """All products of mixing matrices that a chunk needs, for all chunks at once.

    ``within[t, s]`` = c_t Phi(t-1, s) b_s and ``read[t, s]`` = [Phi(t, s) b_s]_1; ``from_start[t]`` = c_t Phi(t-1, 0) and
    ``read_start[t]`` = Phi(t, 0)_1; ``ends[s]`` = Phi(C, s) b_s and ``end`` = Phi(C, 0).
    """
    size = P.shape[-3]
    Phi = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand(*P.shape[:-3], -1, -1)
    X = P.new_zeros(*b.shape)  # Phi(t, s) b_s for s <= t
    within, read, from_start, read_start = [], [], [], []
    for t in range(size):
        at = P[..., t, :, :]
        within.append((X @ c[..., t, :, None]).squeeze(-1))
        from_start.append((c[..., t, None, :] @ Phi).squeeze(-2))
        Phi = at @ Phi
        X = torch.cat([(X @ at.mT)[..., :t, :], b[..., t : t + 1, :], X[..., t + 1 :, :]], -2)
        read.append(X[..., 0])
        read_start.append(Phi[..., 0, :])
    return *(torch.stack(x, -2) for x in (within, read, from_start, read_start)), X, Phi
