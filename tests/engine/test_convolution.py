"""The fused short convolution is the same function as its torch form, gradients included."""

import pytest
import torch

from fastweights.engine.convolution import Part, _in_torch, short_convolution
from fastweights.language.errors import SignalError


@pytest.mark.parametrize(("B", "T", "C", "width"), [(2, 130, 48, 4), (1, 5, 7, 2), (3, 64, 40, 8), (2, 1, 33, 3)])
def test_short_convolution(B, T, C, width):
    after = (Part(32, True, 8), Part(16, True)) if C == 48 else (Part(C),)
    draw = torch.Generator().manual_seed(0)
    x, w, before, bias, weight = (torch.randn(*s, generator=draw) for s in ((B, T, C), (C, width), (B, width - 1, C), (C,), (B, T, C)))
    results = []
    for run, dtype in ((short_convolution, torch.float32), (_in_torch, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, before, bias)]
        y = run(*leaves[:3], after, leaves[3])
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    assert all((a - b).norm() <= 1e-6 * (b.norm() + 1) for a, b in zip(*results, strict=True))
    across, single = x.mT.contiguous().mT, [t.requires_grad_() for t in (x, w, before, bias)]
    assert torch.equal(short_convolution(across, w, before, after), short_convolution(x, w, before, after))
    y = short_convolution(*single[:3], after, bias)
    found = [torch.autograd.grad(y, single, g, retain_graph=True) for g in (weight, weight.mT.contiguous().mT)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_groups_longer_than_a_block_and_parts_of_odd_lengths():
    parts, draw = (Part(600, True, 300), Part(5, True), Part(14, False, 7)), torch.Generator().manual_seed(0)
    given = [torch.randn(*s, generator=draw) for s in ((1, 70, 619), (619, 4), (1, 3, 619), (619,), (1, 70, 619))]
    results = []
    for run, dtype in ((short_convolution, torch.float32), (_in_torch, torch.float64)):
        *leaves, weight = (t.to(dtype).requires_grad_() for t in given)
        y = run(*leaves[:3], parts, leaves[3])
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("T", "width"), [(5, 4), (0, 4), (5, 9), (5, 1)])
def test_what_comes_out_has_the_type_of_what_went_in(T, width):
    y = short_convolution(torch.zeros(1, T, 3, dtype=torch.bfloat16), torch.ones(3, width), torch.zeros(1, width - 1, 3))
    assert y.dtype == torch.bfloat16


def test_default_types_and_devices_are_not_its_own():
    x, weight, before = torch.randn(2, 9, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True), torch.zeros(2, 2, 6)
    want = torch.autograd.grad(short_convolution(x, weight, before).sum(), (x, weight))
    torch.set_default_dtype(torch.float64)
    try:
        found = torch.autograd.grad(short_convolution(x, weight, before).sum(), (x, weight))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        again = torch.autograd.grad(short_convolution(x, weight, before).sum(), (x, weight))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(want, found, again, strict=True))


def test_what_does_not_fit_is_refused():
    x, weight, before = torch.zeros(2, 9, 6), torch.zeros(6, 3), torch.zeros(2, 2, 6)
    with pytest.raises(SignalError, match="expected parts of 6 channels together"):
        short_convolution(x, weight, before, (Part(5),))
    with pytest.raises(SignalError, match="each of whole groups"):
        short_convolution(x, weight, before, (Part(6, True, 4),))
    with pytest.raises(SignalError, match=r"weight is \(5, 3\) and before \(2, 2, 6\), expected \(6, width\)"):
        short_convolution(x, torch.zeros(5, 3), before)
    with pytest.raises(SignalError, match=r"before \(2, 1, 6\), expected"):
        short_convolution(x, weight, before[:, 1:])
