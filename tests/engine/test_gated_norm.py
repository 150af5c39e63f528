"""Norm, weight and gate in one pass are what their equations say, in every form, gradients included."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastweights.engine.gated_norm import gated_norm, gated_unit, unit_length, with_share
from fastweights.engine.kernels import library
from fastweights.language.errors import SignalError, SignalTypeError
from fastweights.layers.norms import GroupedNorm, RMSNorm

RNG = torch.Generator()


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=RNG.manual_seed(seed)).to(dtype)


def by_hand(y, gate, weight, size, eps, activation, gate_first, centred):
    """A row at a time, a group at a time, in numpy."""
    flat = y.reshape(-1, y.shape[-1])
    gates = np.zeros_like(flat) if gate is None else gate.reshape(flat.shape)
    out = np.empty_like(flat)
    for r, (row, g) in enumerate(zip(flat, gates, strict=True)):
        sigma = 1 / (1 + np.exp(-g))
        a = np.ones_like(g) if gate is None else sigma if activation == "sigmoid" else g * sigma
        u = row * a if gate_first else row.copy()
        for i in range(0, len(u), size or len(u)):
            part = u[i : i + (size or len(u))]
            if size:
                part -= part.mean() if centred else 0
                part /= np.sqrt((part**2).mean() + eps)
            part *= 1 if weight is None else weight[: len(part)] if len(weight) == size else weight[i : i + len(part)]
        out[r] = u if gate_first else u * a
    return out.reshape(y.shape)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_its_equation(data):
    size, groups = data.draw(st.sampled_from([0, 1, 3, 8, 16, 37])), data.draw(st.integers(1, 4))
    channels = (size or 5) * groups
    shape = (*data.draw(st.sampled_from([(), (1,), (7,), (2, 65), (2, 3, 4)])), channels)
    weights = data.draw(st.sampled_from([None, channels, *([size] if size else [])]))
    gated, first, centred = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    how = {
        "size": size,
        "eps": 1e-3,
        "activation": data.draw(st.sampled_from(["swish", "sigmoid"])),
        "gate_first": first,
        "centred": centred,
    }
    y, gate = draw(*shape), draw(*shape, seed=1) if gated else None
    weight = None if weights is None else draw(weights, seed=2)
    wide = [None if t is None else t.double() for t in (y, gate, weight)]
    expected = by_hand(*(None if t is None else t.numpy() for t in wide), **{**how, "gate_first": first and gated})
    for found in (gated_norm(y, gate, weight, **how), gated_norm(*wide, **how)):
        assert np.abs(found.numpy() - expected).max() <= 3e-5 * (1 + np.abs(expected).max())
    leaves = [[t.requires_grad_() for t in ts if t is not None] for ts in ((y, gate, weight), wide)]
    seen = draw(*shape, seed=3)
    outs = (gated_norm(y, gate, weight, **how), gated_norm(*wide, **how))
    if outs[0].requires_grad and outs[0] is not y:
        grads = [torch.autograd.grad(o, ls, seen.to(o.dtype)) for o, ls in zip(outs, leaves, strict=True)]
        assert all((a - b).norm() <= 1e-4 * (b.norm() + 1) for a, b in zip(*grads, strict=True))


CASES = {
    "gated": lambda y, gate, weight: gated_norm(y, gate, weight, size=6),
    "gate first": lambda y, gate, weight: gated_norm(y, gate, weight, size=3, gate_first=True, activation="sigmoid"),
    "centred": lambda y, gate, weight: gated_norm(y, None, weight, size=6, centred=True),
    "no norm": lambda y, gate, weight: gated_norm(y, gate),
    "unit": lambda y, gate, weight: gated_unit(torch.cat([gate, y], -1)),
    "length": lambda y, gate, weight: unit_length(y, 0.5),
    "share": lambda y, gate, weight: with_share(y.unflatten(-1, (3, 2)), weight[:3], gate.unflatten(-1, (3, 2))),
}


def leaves(dtype=torch.float32):
    return [draw(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate([(2, 70, 6), (2, 70, 6), (6,)])]


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    run = CASES[case]
    small = [t[:1, :3].detach().requires_grad_() if t.ndim == 3 else t for t in leaves(torch.float64)]
    assert torch.autograd.gradcheck(run, small)
    both = [(ls, run(*ls)) for ls in (leaves(), leaves(torch.float64))]
    if library().lib is not None:
        assert "_GatedNorm" in str(both[0][1].grad_fn) + str(both[0][1].grad_fn.next_functions)
    seen = draw(*both[0][1].shape, seed=9)
    grads = [torch.autograd.grad(y, ls, seen.to(y.dtype), allow_unused=True) for ls, y in both]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_gradients(case):
    def second(dtype):
        ls = leaves(dtype)
        out = CASES[case](*ls)
        first = torch.autograd.grad((out.exp() * draw(*out.shape, seed=8)).sum(), ls, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), ls, allow_unused=True)

    for a, b in zip(second(torch.float32), second(torch.float64), strict=True):
        assert a is None or (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("watched", [False, True])
def test_gradients_in_torch_walk_nothing_twice(watched):
    """A gate that is made of y, and hooks: derivatives of gradients, and whoever sees the backward pass, take another way."""

    def found(norm, create_graph):
        x, weight, calls = *(t.requires_grad_() for t in (draw(2, 3, 6), draw(6, seed=1))), []
        y = x * 1
        y.retain_grad()
        weight.register_hook(lambda g: calls.append(1) or g * 0.5)
        norm(y, 2 * y, weight).square().sum().backward(create_graph=create_graph)
        assert len(calls) == 1
        return [x.grad.detach(), y.grad.detach(), weight.grad.detach()]

    def in_torch(y, gate, weight):
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight * torch.nn.functional.silu(gate)

    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        ours = found(lambda *given: gated_norm(*given, size=6), not watched)
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, found(in_torch, False), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_gradients_come_in_batches(case):
    ls = leaves()
    out = CASES[case](*ls)
    seen = draw(3, *out.shape, seed=7)
    used = [
        t for t, g in zip(ls, torch.autograd.grad(out, ls, seen[0], retain_graph=True, allow_unused=True), strict=True) if g is not None
    ]
    whole = torch.autograd.grad(out, used, seen, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, used, s, retain_graph=True) for s in seen]
    assert all(torch.allclose(a, torch.stack(b), atol=1e-5) for a, b in zip(whole, zip(*single, strict=True), strict=True))


def test_what_is_not_finite_stays_where_it_is():
    up, gate = draw(1, 2, 6), draw(1, 2, 6, seed=1)
    up[0, 0, 2] = float("inf")
    both = []
    for run in (gated_unit, lambda x: torch.nn.functional.silu(x[..., :6]) * x[..., 6:]):
        x = torch.cat([gate, up], -1).requires_grad_()
        both.append(torch.autograd.grad(run(x).sum(), x)[0])
    assert torch.allclose(*both, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_transforms_and_graphs_see_torch(case):
    run, (y, gate, weight) = CASES[case], [t.detach() for t in leaves()]
    expected = run(y, gate, weight)
    assert torch.allclose(torch.vmap(lambda a, b: run(a[None], b[None], weight)[0])(y, gate), expected, atol=1e-6)
    _, tangent = torch.func.jvp(lambda a: run(a, gate, weight), (y,), (torch.ones_like(y),))
    wide, exact = torch.func.jvp(lambda a: run(a, gate.double(), weight.double()), (y.double(),), (torch.ones_like(y.double()),))
    assert torch.allclose(tangent.double(), exact, atol=1e-4)
    assert torch.allclose(expected.double(), wide, atol=1e-5)
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="eager")(y, gate, weight), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_strides_threads_or_neighbours(case):
    run = CASES[case]
    found = []
    for threads, turned in ((1, False), (2, False), (2, True)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y, gate, weight = leaves()
            given = (y.mT.contiguous().mT, gate.mT.contiguous().mT, weight) if turned else (y, gate, weight)
            out = run(*given)
            seen = draw(*out.shape, seed=4)
            seen = seen.mT.contiguous().mT if turned else seen
            found.append([out, *torch.autograd.grad(out, (y, gate, weight), seen, allow_unused=True)])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    y, gate, weight = leaves()
    alone = [t[1:, 5:6].detach().requires_grad_() for t in (y, gate)]
    assert torch.equal(run(*alone, weight), run(y, gate, weight)[1:, 5:6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    y, gate, weight = (t.detach().to(dtype).requires_grad_() for t in leaves())
    out = gated_norm(y, gate, weight, size=6)
    wide = [t.detach().float().requires_grad_() for t in (y, gate, weight)]
    exact = gated_norm(*wide, size=6)
    assert torch.equal(out, exact.to(dtype))
    seen = draw(*out.shape, seed=5, dtype=dtype)
    grads = zip(torch.autograd.grad(out, (y, gate, weight), seen), torch.autograd.grad(exact, wide, seen.float()), strict=True)
    assert all(torch.equal(a, b.to(dtype)) for a, b in grads)
    mixed = gated_norm(wide[0], gate, weight, size=6)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)


def test_a_bad_row_spoils_no_other():
    y = draw(2, 70, 6)
    y[1, 3] = float("nan")
    found = gated_norm(y, None, torch.ones(6), size=6)
    assert found[1, 3].isnan().all()
    assert found.isnan().sum() == 6


def test_nothing_is_nothing():
    for shape in ((0, 3, 6), (2, 0, 6)):
        y = torch.zeros(shape, requires_grad=True)
        out = gated_norm(y, y, torch.ones(6), size=6)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), y)[0].shape == shape


def test_errors_say_what_is_wrong():
    y = torch.ones(1, 2, 6)
    for call, words in {
        lambda: gated_norm(y, torch.ones(1, 2, 5)): "gate is .1, 2, 5., expected the shape of y",
        lambda: gated_norm(y, size=4): "size is 4, expected a divisor of the 6 channels",
        lambda: gated_norm(y, weight=torch.ones(2), size=3): "weight is .2,., expected a number for each of the 6 channels of y or the 3",
        lambda: gated_norm(y, weight=torch.ones(0)): "weight is .0,., expected a number for each of the 6 channels of y$",
        lambda: unit_length(torch.arange(3)): "y is torch.int64 of shape .3,., expected floating-point",
        lambda: RMSNorm(5)(y): "x is .1, 2, 6., expected .*5. or a multiple of 5 channels",
        lambda: GroupedNorm(4, 6): "groups is 4, expected a divisor of the 6 channels",
        lambda: GroupedNorm(2, 6)(torch.ones(1, 12)): "x is .1, 12., expected .*6.",
        lambda: gated_norm(y, y, activation="gelu"): "activation is 'gelu'; known: sigmoid, swish",
        lambda: gated_unit(torch.ones(1, 3)): "x is .1, 3., expected an even number of channels",
        lambda: with_share(torch.ones(1, 1, 2, 3), torch.ones(3), torch.ones(1, 1, 2, 3)): "skip .3,., .* expected",
    }.items():
        with pytest.raises((SignalError, SignalTypeError), match=words):
            call()
