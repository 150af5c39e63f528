"""Who sees what runs: modes, transforms, tracers, compilers. For them the kernels are one operator, or do not run; values stay unseen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

modes, _level = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level  # pyright: ignore[reportAttributeAccessIssue]
_batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]  # of is_grads_batched
_tracing = torch._C._get_tracing_state  # of torch.jit


def forward_derivatives() -> bool:
    """Whether derivatives are taken forward, along with the values."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of torch.func sees every operator, or derivatives are taken forward."""
    return _level() is not None or forward_derivatives()


def recorded() -> bool:
    """Whether someone sees every operator: a mode of torch, a transform, a tracer."""
    return modes() > 0 or transformed() or _tracing() is not None


def traced(tensors: Iterable[Tensor]) -> bool:
    """Whether someone records what runs, who must see one operator; or a tensor is not what lies at its address."""
    return recorded() or any(
        type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() or t._is_zerotensor() or _batched(t) for t in tensors
    )


def may_look(x: Tensor) -> bool:
    """Whether values may be looked at: not while a graph is compiled, nor inside vmap and its kin, nor where there are none."""
    if torch.compiler.is_compiling() or _level() is not None:
        return False
    return not x.is_meta and not isinstance(x, FakeTensor) and active_fake_mode() is None
