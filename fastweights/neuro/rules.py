"""Rules of synapses and neurons that the catalogue does not have: what drives its own plasticity, relaxes exactly, or is divided."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import rules
from ..language.decorator import outer, rule
from ..language.errors import FastWeightError
from ..language.roles import Key, KeyState, LogDecay, PositiveKey, PositiveQuery, Rate, Scalar, ScalarState, Value


@rule(cite="Oja 1982, J. Math. Biology 15; 1989, Int. J. Neural Systems 1")
def oja_neurons(W, k: Key, beta: Rate):
    """Oja's rule where the neurons themselves are the programmer: the catalogue's oja with the value v = W k, which the old W reads."""
    return rules.oja(W, k, W @ k, beta)


@functools.lru_cache(maxsize=64)
def chain_modes(m: int) -> tuple[Tensor, Tensor]:
    """Rates (m,) and modes (m, m), in columns, of the chain of m variables of Benna and Fusi: their matrix is E diag(-rates) E^-1.

    C_k du_k/dt = g_{k-1} (u_{k-1} - u_k) - g_k (u_k - u_{k+1}), with C_k = 2^(k-1), g_k = 2^-(k+2), g_0 = 0 and u_{m+1} = 0. The modes are
    orthonormal in the scalar product weighted by C, so that E^-1 = E^T diag(C). The unit of time is theirs: what u_1 relaxes in is 8.

    >>> rates, E = chain_modes(2)
    >>> C = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> torch.allclose(E.T @ torch.diag(C) @ E, torch.eye(2, dtype=torch.float64))
    True
    """
    if m < 1:
        raise FastWeightError(f"a chain of {m} variables; it has at least 1")
    k = torch.arange(1, m + 1, dtype=torch.float64)
    C, g = 2 ** (k - 1), 2 ** -(k + 2)
    before = torch.cat([g.new_zeros(1), g[:-1]])
    flow = torch.diag(before + g) - torch.diag(g[:-1], 1) - torch.diag(g[:-1], -1)
    half = C.rsqrt()
    rates, modes = torch.linalg.eigh(half[:, None] * flow * half)
    return rates, half[:, None] * modes


@rule(cite="Benna and Fusi 2016, Nature Neuroscience 19")
def synaptic_chain(W, k: Key, v: Value, dt: Scalar):
    """A chain of any number of variables in the place of each weight: a row is a synapse, a column one of its variables.

    The chain relaxes exactly over dt, the time since the last token, where the catalogue's ``cascade`` (a matrix for each variable) takes
    a step of Euler; then v is written to the variables in k, to the first alone for k = (1, 0, ...).
    """
    rates, E = chain_modes(W.shape[1])
    C = 2.0 ** torch.arange(W.shape[1])
    return ((W * C.to(W.dtype)) @ E.to(W.dtype) * torch.exp(-rates.to(W.dtype) * dt)) @ E.mT.to(W.dtype) + outer(v, k)


@rule(cite="Kozachkov, Kastanenka and Krotov 2023, PNAS 120")
def tripartite(W, c: KeyState, a: ScalarState, q: PositiveQuery, k: PositiveKey, v: Value, g: LogDecay):
    """Hebb's rule, and an astrocyte that divides what is read: its processes sum presynaptic activity, c; its calcium a follows c^T q."""
    W, c, kept = W + outer(v, k), c + k, g.exp()
    a = kept * a + (1 - kept) * (c @ q)
    return W, c, a, W @ q / a
