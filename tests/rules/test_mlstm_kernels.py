"""``exp_gated_hebb`` against the chunkwise form in plain torch of its authors' own package, where that is installed."""

import pytest
import torch
from torch.nn import functional as F

import fastweights as fw

native = pytest.importorskip("mlstm_kernels.torch.chunkwise.native", reason="mlstm_kernels is not installed")


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("gates", [1.0, 8.0])
@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
def test_outputs_states_and_gradients(form, gates):
    B, T, H, K, V = 2, 48, 3, 8, 5
    q, k, v = (drawn(B, T, H, n, seed=i) for i, n in enumerate((K, K, V)))
    i, f = drawn(B, T, H, seed=3), drawn(B, T, H, seed=4)
    theirs, (C, n, m) = native.mlstm_chunkwise__native_autograd(
        *(x.transpose(1, 2) for x in (q, k, v, gates * i, gates * f)), return_last_states=True, chunk_size=16, eps=0.0
    )
    ours, (W, norm, top) = fw.scan(
        fw.rules.exp_gated_hebb, q=q * K**-0.5, k=k, v=v, i=gates * i, g=F.logsigmoid(gates * f), form=form, backend="torch"
    )
    for got, expected in ((ours, theirs.transpose(1, 2)), (W, C.mT), (norm, n), (top, m.squeeze(-1))):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-10)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    inputs = (q, k, v, i, f)
    mine = torch.autograd.grad((ours * weights).sum(), inputs)
    for got, expected in zip(mine, torch.autograd.grad((theirs.transpose(1, 2) * weights).sum(), inputs), strict=True):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-9)
