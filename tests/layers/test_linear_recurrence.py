"""Recurrences with a decay for every number: blocks are the loop, whatever the decays; selective scans are fast weights."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers import linear_recurrence as module
from fastweights.layers.linear_recurrence import linear_recurrence, selective_scan, selective_signals, ssd_parameters, ssd_signals


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loop(a, b, h, reset=None):
    every = []
    for t in range(a.shape[1]):
        if reset is not None:
            h = np.where(reset[:, t].reshape(-1, *(1,) * (h.ndim - 1)), 0, h)
        h = a[:, t] * h + b[:, t]
        every.append(h)
    return np.stack(every, 1)


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 97, 256, 331])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_blocks_are_the_loop(steps, dtype):
    a, b, h = draw(2, steps, 3, 2, dtype=dtype) * 0.8, draw(2, steps, 3, 2, seed=1, dtype=dtype), draw(2, 3, 2, seed=2, dtype=dtype)
    assert np.allclose(linear_recurrence(a, b, h).numpy(), loop(a.numpy(), b.numpy(), h.numpy()), rtol=1e-10, atol=1e-12)


def test_decays_near_zero_and_one_and_far_from_both():
    """Products of decays that underflow, zeros, and ones: nothing is divided, so nothing is lost."""
    a = torch.tensor([0.0, 1e-300, 1e-12, 1.0, -1.0, 1 - 1e-15], dtype=torch.float64)[torch.randint(6, (1, 400), generator=_g())]
    b, h = draw(1, 400) * 10.0 ** draw(1, 400, seed=1), draw(1)
    found = linear_recurrence(a, b, h)
    assert np.allclose(found.numpy(), loop(a.numpy(), b.numpy(), h.numpy()), rtol=1e-10, atol=0)
    tiny = linear_recurrence(torch.full((1, 999), 1e-30), torch.ones(1, 999), torch.zeros(1))
    assert (tiny == 1).all()


def _g():
    return torch.Generator().manual_seed(0)


def test_a_reset_forgets_what_is_not_finite_too():
    a, b, h = torch.full((2, 50), 0.9).double(), torch.ones(2, 50).double(), torch.zeros(2).double()
    b[0, 3] = torch.nan
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[0, 30] = reset[1, 7] = True
    found = linear_recurrence(a, b, h, reset)
    assert found[0, 3:30].isnan().all()
    assert torch.allclose(found[0, 30:], found[1, 7:27], rtol=1e-14)
    assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_its_derivatives(dtype, monkeypatch):
    monkeypatch.setattr(module, "_SEQUENTIAL", 4)  # blocks within blocks
    a, b, h = draw(1, 11, 1, dtype=dtype) * 0.7, draw(1, 11, 1, seed=1, dtype=dtype), draw(1, 1, seed=2, dtype=dtype)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, 6] = True
    for at in (None, reset):
        inputs = [x.clone().requires_grad_() for x in (a, b, h)]
        assert torch.autograd.gradcheck(lambda a, b, h, at=at: linear_recurrence(a, b, h, at), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b, h, at=at: linear_recurrence(a, b, h, at), inputs)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(fw.SignalError, match="without their T"):
        linear_recurrence(torch.ones(1, 4, 1), torch.ones(1, 4, 2), torch.zeros(1, 2))
    with pytest.raises(fw.SignalError, match="expected x and dt"):
        selective_scan(x=torch.ones(1, 4, 2), dt=torch.ones(1, 4, 1), A=-torch.ones(2, 3), B=torch.ones(1, 4, 3), C=torch.ones(1, 4, 3))


def selective(steps, rows=2, channels=5, keys=3):
    return {
        "x": draw(rows, steps, channels), "dt": draw(rows, steps, channels, seed=1).exp(), "A": -draw(channels, keys, seed=2).exp(),
        "B": draw(rows, steps, keys, seed=3), "C": draw(rows, steps, keys, seed=4),
    }  # fmt: skip


def selective_loop(x, dt, A, B, C, W):
    ys = []
    for t in range(x.shape[1]):
        W = np.exp(dt[:, t, :, None] * A) * W + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        ys.append((W * C[:, t, None, :]).sum(-1))
    return np.stack(ys, 1), W


@pytest.mark.parametrize("steps", [1, 7, 64, 149])
@pytest.mark.parametrize("span", [16, 2**20])
def test_a_selective_scan_is_the_loop_in_spans_of_any_length(steps, span, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS_A_SPAN", {"cpu": span})
    given, W = selective(steps), draw(2, 5, 3, seed=5)
    y, state = selective_scan(**given, state=W)
    want, last = selective_loop(*(given[n].numpy() for n in ("x", "dt", "A", "B", "C")), W.numpy())
    assert np.allclose(y.numpy(), want, rtol=1e-10, atol=1e-12)
    assert np.allclose(state.numpy(), last, rtol=1e-10, atol=1e-12)


def test_a_selective_scan_is_decayed_hebb_with_a_head_for_each_channel():
    given, reset = selective(37), torch.rand(2, 37, generator=_g()) < 0.2
    y, W = selective_scan(**given, reset=reset)
    same = fw.scan(fw.rules.decayed_hebb, **selective_signals(**given), reset=reset)
    assert torch.allclose(same.y.squeeze(-1), y, rtol=1e-10, atol=1e-12)
    assert torch.allclose(same.state.squeeze(2), W, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_selective_scan_does_not_depend_on_its_spans(monkeypatch):
    def gradients():
        given = {n: x.clone().requires_grad_() for n, x in selective(40).items()}
        W = draw(2, 5, 3, seed=5).requires_grad_()
        y, state = selective_scan(**given, state=W)
        return torch.autograd.grad((y * y.detach().cos()).sum() + state.sum(), [*given.values(), W])

    whole = gradients()
    monkeypatch.setattr(module, "_NUMBERS_A_SPAN", {"cpu": 16})
    for a, b in zip(whole, gradients(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    inputs = [x.requires_grad_() for x in selective(17, 1, 2, 2).values()]
    assert torch.autograd.gradcheck(lambda *s: selective_scan(**dict(zip(["x", "dt", "A", "B", "C"], s, strict=True))).y, inputs)


def test_a_gradient_keeps_much_less_than_a_state_a_token(monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS_A_SPAN", {"cpu": 2**12})
    given = {n: x.requires_grad_() for n, x in selective(1000, 1, 16, 16).items()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() / x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        selective_scan(**given)
    assert sum(kept.values()) < sum(x.numel() for x in given.values()) + 1000 * 16 * 16 / 8


def ssd(groups):
    return {
        "x": draw(2, 11, 4, 3), "dt": draw(2, 11, 4, seed=1).exp(), "A": -draw(4, seed=2).exp(),
        "B": draw(2, 11, groups, 5, seed=3), "C": draw(2, 11, groups, 5, seed=4),
    }  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_state_space_duality_there_and_back(groups):
    """h_t = exp(dt A) h_{t-1} + dt x B^T, y = h C, in numpy, is stepped_hebb; and its signals say which system they are."""
    given = ssd(groups)
    x, dt, A, B, C = (x.numpy() for x in given.values())
    B, C = (np.repeat(s, 4 // groups, 2) for s in (B, C))
    h, want = np.zeros((2, 4, 3, 5)), []
    for t in range(11):
        h = np.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        want.append(np.einsum("bhvk,bhk->bhv", h, C[:, t]))
    signals = ssd_signals(**given)
    y, W = fw.scan(fw.rules.stepped_hebb, **signals)
    assert np.allclose(y.numpy(), np.stack(want, 1), rtol=1e-10, atol=1e-12)
    assert np.allclose(W.numpy(), h, rtol=1e-10, atol=1e-12)
    for n, back in ssd_parameters(**signals)._asdict().items():
        assert torch.allclose(back, given[n], rtol=1e-12), n


def test_retnet_is_mamba2_and_a_gate_that_follows_the_input_is_not():
    q, k, v = draw(1, 6, 2, 3), draw(1, 6, 2, 3, seed=1), draw(1, 6, 2, 4, seed=2)
    gamma = torch.log(torch.tensor([0.9, 0.99], dtype=torch.float64)).expand(1, 6, 2)
    system = ssd_parameters(q=q, k=k, v=v, g=gamma)
    assert torch.allclose(system.A.exp(), torch.tensor([0.9, 0.99], dtype=torch.float64))
    same = fw.scan(fw.rules.stepped_hebb, **ssd_signals(**system._asdict())).y
    assert torch.allclose(same, fw.scan(fw.rules.decayed_hebb, q=q, k=k, v=v, g=gamma).y, rtol=1e-12)
    other = gamma.clone()
    other[0, 2, 1] *= 2
    with pytest.raises(fw.SignalError, match=r"heads \[1\]"):
        ssd_parameters(q=q, k=k, v=v, g=other)
