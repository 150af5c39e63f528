"""Paths: through their samples, with the slopes they claim, over missing values, and causal where they say so."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers.interpolation import KINDS, interpolate

NAN = float("nan")
CAUSAL = ("linear", "hermite", "rectilinear")


def drawn(T=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    times = (torch.rand(2, T, dtype=torch.float64, generator=g) + 0.1).cumsum(1)
    return torch.randn(2, T, 3, dtype=torch.float64, generator=g), times


def between(times, n=50):
    """(B, n) times from the first to the last."""
    return times[:, :1] + (times[:, -1:] - times[:, :1]) * torch.linspace(0, 1, n, dtype=times.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_a_path_passes_through_its_samples(kind, T):
    x, times = drawn(T)
    assert torch.allclose(interpolate(x, times, kind)(times), x, rtol=0, atol=1e-12)
    if T == 1:
        assert not interpolate(x, times, kind).derivative(times).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_the_path(kind):
    x, times = drawn()
    path, t = interpolate(x, times, kind), between(times).requires_grad_()
    for c in range(3):
        (slope,) = torch.autograd.grad(path(t)[..., c].sum(), t)
        assert torch.allclose(path.derivative(t)[..., c], slope, rtol=1e-10, atol=1e-10)


def test_linear_is_numpys():
    x, times = drawn()
    path, t = interpolate(x, times), between(times)
    for b in range(2):
        for c in range(3):
            assert np.allclose(path(t)[b, :, c], np.interp(t[b], times[b], x[b, :, c]), rtol=0, atol=1e-12)


def test_hermite_has_the_backward_differences_as_slopes_on_both_sides():
    x, times = drawn()
    path, backward = interpolate(x, times, "hermite"), x.diff(dim=1) / times.diff(dim=1)[..., None]
    assert torch.allclose(path.derivative(times[:, 1:]), backward, rtol=1e-10)
    assert torch.allclose(path.derivative(times[:, :1]), backward[:, :1])  # the first has none before it
    assert torch.allclose(path.derivative(times[:, 1:] - 1e-9), backward, atol=1e-6)


def test_rectilinear_waits_and_then_goes():
    path = interpolate(torch.tensor([[[1.0], [3.0], [2.0]]], dtype=torch.float64), torch.tensor([0.0, 4.0, 6.0]), "rectilinear")
    t = torch.tensor([0.0, 1.0, 1.99, 2.0, 3.0, 4.0, 4.9, 5.5, 6.0])
    assert torch.allclose(path(t).flatten(), torch.tensor([1, 1, 1, 1, 2, 3, 3, 2.5, 2], dtype=torch.float64), atol=1e-6)
    assert path.derivative(t).flatten().tolist() == [0, 0, 0, 1, 1, 0, 0, -1, -1]


def test_natural_has_two_continuous_derivatives_and_no_curvature_at_its_ends():
    x, times = drawn()
    path = interpolate(x, times, "natural")

    def curvature(t):
        t = t.clone().requires_grad_()
        return torch.stack([torch.autograd.grad(path.derivative(t)[..., c].sum(), t)[0] for c in range(3)], -1)

    eps = 1e-9
    assert torch.allclose(path.derivative(times[:, 1:-1] - eps), path.derivative(times[:, 1:-1]), rtol=0, atol=1e-6)
    assert torch.allclose(curvature(times[:, 1:-1] - eps), curvature(times[:, 1:-1]), rtol=0, atol=1e-5)
    assert curvature(times[:, [0, -1]]).abs().max() < 1e-10


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_natural_is_scipys(share):
    interpolation = pytest.importorskip("scipy.interpolate")
    x, times = drawn(20)
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share
    for b in range(2):
        path = interpolate(torch.where(missing, NAN, x)[b : b + 1], times[b], "natural")
        for c in range(3):
            there = ~missing[b, :, c]
            spline = interpolation.CubicSpline(times[b, there], x[b, there, c], bc_type="natural")
            t = torch.linspace(times[b, there][0], times[b, there][-1], 40, dtype=torch.float64)[1:-1]
            assert np.allclose(path(t)[0, :, c], spline(t), rtol=1e-10, atol=1e-10)
            assert np.allclose(path.derivative(t)[0, :, c], spline(t, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_values(kind):
    x, times = drawn()
    x[0, [0, 3, 4, 7], 0] = x[1, :, 1] = x[1, 2, 0] = x[1, 1:, 2] = NAN
    found = interpolate(x, times, kind)(times)
    for b in range(2):
        for c in range(3):
            row, there = x[b, :, c].numpy(), ~x[b, :, c].isnan().numpy()
            assert np.allclose(found[b, there, c], row[there], rtol=0, atol=1e-12)
            want, last = np.zeros(8), 0.0
            if kind == "rectilinear":
                for i in range(8):
                    last = want[i] = row[i] if there[i] else last
            elif there.any():
                want = np.interp(times[b], times[b, there], row[there])
            if kind != "natural" or there.sum() < 3:  # one or two samples are constant or a line
                assert np.allclose(found[b, :, c], want, rtol=0, atol=1e-12)
    assert interpolate(x, times, kind).derivative(between(times)).isfinite().all()
    if kind in ("linear", "natural"):  # constant before the first value and after the last
        ends = torch.stack([times[:, 0] + 1e-3, times[:, 7] - 1e-3], 1)
        assert not interpolate(x, times, kind).derivative(ends)[0, :, 0].any()


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_path_up_to_a_sample_depends_on_no_later_one(kind):
    x, times = drawn()
    other = x.clone()
    other[:, 5:] += 1
    t = between(times[:, :5])
    t[:, -1] = times[:, 4]
    assert torch.equal(interpolate(x, times, kind)(t), interpolate(other, times, kind)(t))
    assert not torch.allclose(interpolate(x, times, "natural")(t), interpolate(other, times, "natural")(t))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    x, times = drawn(5)
    holes = torch.zeros_like(x, dtype=torch.bool)
    holes[0, 2, 1] = holes[1, 0, 0] = True

    def read(x):
        path = interpolate(torch.where(holes, NAN, x), times, kind)
        return path(between(times, 9)), path.derivative(between(times, 9))

    assert torch.autograd.gradcheck(read, x.requires_grad_())


def test_times_are_shared_or_of_each_row():
    x, times = drawn()
    shared, own = interpolate(x, times[0]), interpolate(x, times[:1].expand(2, -1))
    assert torch.equal(shared(between(times[:1]).squeeze(0)), own(between(times[:1]).expand(2, -1)))
    assert shared(times[0, 2]).shape == (2, 3)
    assert torch.equal(interpolate(x)(torch.tensor(2.0)), x[:, 2])


X = torch.zeros(2, 3, 1)
BAD = {
    "path is 'cubic'": lambda: interpolate(X, kind="cubic"),
    "at least one sample": lambda: interpolate(X[:, :0]),
    "expected a tensor (B, T, C)": lambda: interpolate(X[0]),
    "times is (4,), expected (T,) or (B, T) with B = 2, T = 3": lambda: interpolate(X, torch.arange(4)),
    "in row 1 a sample at 1 s is not later": lambda: interpolate(X, torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]])),
    "times has NaN": lambda: interpolate(X, torch.tensor([0.0, NAN, 1.0])),
    "times is list": lambda: interpolate(X, [0, 1, 2]),
    "times takes no gradient": lambda: interpolate(X, torch.arange(3.0).requires_grad_()),
    "but the path only from 0 to 2 s": lambda: interpolate(X)(2.5),
    "expected a number, (N,), or (B, N) with B = 2": lambda: interpolate(X)(torch.zeros(3, 1)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
