"""A call that has been prepared is the same call: whoever watches, whatever tensors look like, and however many run at once."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import R
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastweights as fw
from fastweights.engine import prepared
from fastweights.engine.check import example
from fastweights.engine.kernels import library

pytestmark = pytest.mark.skipif(library().lib is None, reason=f"no kernels: {library().why}")


def signals(T=70, grad=False, **size):
    made = example(R.gated_delta, 2, T, 4, size.get("K", 20), size.get("V", 24))
    return {n: x.float().requires_grad_(grad) for n, x in made.items()}


def slopes(given, **options):
    y, W = fw.scan(R.gated_delta, **given, **options)
    return torch.autograd.grad(y.square().sum() + W.sum(), list(given.values()))


def looks(x):
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def variants():
    x = torch.ones(2, 6, 4)
    return [
        x,
        torch.zeros(2, 6, 4),
        x.double(),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:1],
        x[..., 0],
        x.clone().requires_grad_(),
        torch.nn.Parameter(x),
        x.to("meta"),
        x.to_sparse(),
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(10)), min_size=1, max_size=3), st.lists(st.sampled_from(range(10)), min_size=3, max_size=3))
def test_what_fits_is_of_the_same_looks(known, asked):
    known = [variants()[i] for i in known if i < 8]
    asked = [variants()[i] for i in asked][: len(known)]
    same = all(b.layout == torch.strided and looks(a) == looks(b) for a, b in zip(known, asked, strict=True))
    assert prepared.fits_in_python(tuple(known))(*asked) == same
    assert bool(prepared._fits(tuple(known))(*asked)) == same


def test_without_a_part_of_torch_that_may_change(monkeypatch):
    given = signals(31, True)
    want = slopes(given)
    monkeypatch.setattr(prepared, "_fits", prepared.fits_in_python)
    prepared.known.calls.clear()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(slopes(given), want, strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_tensors_without_values_are_not_read(grad, before):
    if before:
        fw.scan(R.gated_delta, **signals(grad=grad))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = {n: mode.from_tensor(x.detach()).requires_grad_(grad) for n, x in signals().items()}
        y, W = fw.scan(R.gated_delta, **given)
        one = fw.step(R.gated_delta, W, **{n: x[:, 0] for n, x in given.items()})
        if grad:
            (y.sum() + one.y.sum()).backward()
            assert given["g"].grad.shape == given["g"].shape
    assert y.shape == (2, 70, 4, 24)
    assert one.state.shape == W.shape


@pytest.mark.parametrize("grad", [False, True])
def test_a_mode_without_values_sees_tensors_that_have_some(grad):
    given = signals(grad=grad)
    _, W = fw.scan(R.gated_delta, **given)
    one = {n: x[:, 0].detach() for n, x in given.items()}
    fw.step(R.gated_delta, W.detach(), **one)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(fw.scan(R.gated_delta, **given).y, FakeTensor)
        assert isinstance(fw.step(R.gated_delta, W.detach(), **one).y, FakeTensor)


def test_who_counts_operations_is_heard():
    """A mode of torch sees the operator."""
    given = signals(grad=True)
    fw.scan(R.gated_delta, **given)
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        fw.scan(R.gated_delta, **given).y.sum().backward()
    assert {"fastweights.scan.default", "fastweights.scan_backward.default"} <= set(seen)
    with FlopCounterMode(display=False), torch.no_grad():
        fw.scan(R.gated_delta, **given)


@pytest.mark.parametrize("grad", [False, True])
def test_a_default_device_is_not_theirs(grad):
    given = signals(grad=grad)
    want = fw.scan(R.gated_delta, **given)
    with torch.device("meta"):
        found = fw.scan(R.gated_delta, **given)
        if grad:
            (found.y.sum() + found.state.sum()).backward()
    assert torch.equal(found.y, want.y)
    assert torch.equal(found.state, want.state)


def test_saved_tensors_may_return_in_another_layout():
    given = signals(grad=True)
    want = slopes(given)

    def unpack(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            found = slopes(given)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_two_backward_passes_at_once():
    given = signals(600, True, K=48, V=48)
    y, W = fw.scan(R.gated_delta, **given)
    loss, inputs = y.square().sum() + W.sum(), list(given.values())
    want = torch.autograd.grad(loss, inputs, retain_graph=True)

    def right(_):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(20)))


@pytest.mark.parametrize("needed", [("g",), ("k", "beta"), ("state",), ("q", "v", "state")])
@pytest.mark.parametrize("through", ["y", "state"])
def test_only_what_is_asked_for(needed, through):
    """With some of the gradients, through one of the outputs, with resets: the ones of torch."""
    given = signals(33)
    state = torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(1))
    reset = torch.arange(33).expand(2, 33) % 13 == 5

    def of(backend):
        every = {n: x.clone().requires_grad_(n in needed) for n, x in {**given, "state": state}.items()}
        out = getattr(fw.scan(R.gated_delta, **every, reset=reset, backend=backend), through)
        return out, torch.autograd.grad(out.square().sum(), [every[n] for n in needed], allow_unused=True)

    for _ in range(2):
        (out, found), (right, want) = of("cpu"), of("torch")
        assert torch.allclose(out, right, atol=1e-5)
        for a, b in zip(found, want, strict=True):
            b = torch.zeros_like(a) if b is None else b
            assert torch.allclose(a, b, atol=1e-4)


def test_first_derivatives_where_second_ones_are_kept():
    given = signals(9, True)
    y = fw.scan(R.gated_delta, **given).y
    kept, again = (torch.autograd.grad(y.square().sum(), list(given.values()), create_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk", "auto"])
def test_shapes_alone(form):
    """Tensors on torch's meta device: nothing is computed, and the shapes are right."""
    y, W = fw.scan(R.gated_delta, **{n: x.to("meta") for n, x in signals(5).items()}, form=form)
    assert (y.shape, W.shape, y.device.type) == ((2, 5, 4, 24), (2, 4, 24, 20), "meta")


def test_a_tuple_of_one_state_is_that_state():
    given, W = signals(5), torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    (y, new), (y1, new1) = fw.scan(R.gated_delta, **given, state=(W,)), fw.scan(R.gated_delta, **given, state=W)
    assert torch.equal(y, y1)
    assert torch.equal(new, new1)


@pytest.mark.parametrize("T", [9, 3000])
def test_gradients_that_are_negated_later(T):
    """Complex conjugates give gradients whose memory holds their negatives."""
    given, c = signals(T, True), torch.randn(2, T, 4, 24, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))

    def of(backend):
        y = fw.scan(R.gated_delta, **given, backend=backend).y
        seen = []
        y.register_hook(lambda g: seen.append(g.is_neg()))
        return torch.autograd.grad((torch.complex(torch.ones_like(y), y).conj() * c).sum().real, list(given.values())), seen

    (found, negated), (want, _) = of("auto"), of("torch")
    assert negated == [True]
    assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(found, want, strict=True))
    values = {n: x.detach() for n, x in given.items()}
    minus = {**values, "v": torch.complex(values["v"], -values["v"]).conj().imag}
    assert minus["v"].is_neg()
    assert torch.equal(fw.scan(R.gated_delta, **minus).y, fw.scan(R.gated_delta, **values).y)


@pytest.mark.parametrize("rule", [R.gated_delta, R.hebb])
@pytest.mark.parametrize("T", [9, 3000])
@pytest.mark.parametrize("grad", [False, True])
def test_results_may_be_changed_in_place(rule, T, grad):
    given = {n: x for n, x in signals(T, grad).items() if n in ("q", *rule.signals)}
    y, W = fw.scan(rule, **given)
    factor = torch.full((), 2.0, requires_grad=True)
    y.mul_(factor)
    W.add_(factor)
    (y.sum() + W.sum()).backward()
    assert factor.grad.isfinite()


def test_a_call_within_a_call(monkeypatch):
    """What a signal handler or a finaliser may do, just before the kernels run."""
    given, other = signals(40), {n: x.flip(1) for n, x in signals(40).items()}
    want, inside = fw.scan(R.gated_delta, **given), []
    one = {n: x[:, 0] for n, x in given.items()}
    stepped = fw.step(R.gated_delta, want.state, **one)
    threads = torch.get_num_threads

    def interrupt(now):
        monkeypatch.setattr(torch, "get_num_threads", now)
        monkeypatch.setattr(prepared, "_threads", now)

    def interrupted():
        interrupt(threads)
        inside.append(fw.scan(R.gated_delta, **other))
        fw.step(R.gated_delta, want.state, **{n: x[:, 0] for n, x in other.items()})
        return threads()

    interrupt(interrupted)
    found = fw.scan(R.gated_delta, **given)
    interrupt(interrupted)
    again = fw.step(R.gated_delta, want.state, **one)
    assert len(inside) == 2
    assert torch.equal(found.y, want.y)
    assert torch.equal(found.state, want.state)
    assert torch.equal(again.y, stepped.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learned", [False, True])
def test_numbers_around_a_rule_may_change(dtype, learned):
    rate = torch.tensor(0.5, dtype=dtype, requires_grad=learned)

    @fw.rule
    def scaled(W, k: fw.Key, v: fw.Value):
        return W + rate * fw.outer(v, k)

    given = {n: signals(9)[n] for n in "qkv"}
    for _ in range(2):
        found, want = fw.scan(scaled, **given), fw.scan(scaled, **given, form="recurrent")
        assert torch.allclose(found.y, want.y, atol=1e-5)
        assert found.y.requires_grad == learned
        one, first = {n: x[:, 0] for n, x in given.items()}, {n: x[:, :1] for n, x in given.items()}
        assert torch.allclose(fw.step(scaled, torch.zeros_like(want.state), **one).state, fw.scan(scaled, **first, form="recurrent").state)
        with torch.no_grad():
            rate.fill_(2)


def test_a_step_into_its_own_state():
    given = {n: x[:, 0] for n, x in signals(1).items()}
    W = torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    p = torch.ones_like(W, requires_grad=True)
    fw.step(R.gated_delta, W, out=W, **given)
    loss = (W * p).sum()
    fw.step(R.gated_delta, W, out=W, **given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = W.clone()
    for _ in range(2):
        with pytest.raises(fw.SignalError, match="log decay is positive"):
            fw.step(R.gated_delta, W, out=W, **{**given, "g": -given["g"] + 0.1})
        assert torch.equal(W, before)
    one = torch.zeros(1, 1, 24, 20).expand(2, 4, 24, 20)
    with pytest.raises(RuntimeError, match="more than one element"):
        fw.step(R.gated_delta, one, out=one, **given)
    with torch.inference_mode():
        own = torch.zeros(2, 4, 24, 20)
        fw.step(R.gated_delta, own, out=own, **given)
    with pytest.raises(fw.SignalError, match="out cannot hold"):
        fw.step(R.gated_delta, p, out=p, **given)


def test_the_last_step_of_a_rule_serves_only_steps_like_it():
    given = {n: x[:, 0] for n, x in signals(1).items()}
    W = torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    swapped = {**dict(reversed(given.items())), "q": given["k"], "k": given["q"]}  # tensors of the same shapes in other places
    learned = {**given, "v": given["v"].clone().requires_grad_()}
    for one in (
        given,
        swapped,
        {n: x[:1] for n, x in given.items()},
        learned,
        given,
        {**given, "q": given["k"]},
        {**swapped, "g": given["g"] * 0},
    ):
        state = W[: one["k"].shape[0]]
        y, new = fw.step(R.gated_delta, state, **one)
        want = fw.step(R.gated_delta, state, **one, backend="torch")
        assert torch.allclose(y, want.y, atol=1e-5)
        assert torch.allclose(new, want.state, atol=1e-5)
        assert y.requires_grad == new.requires_grad == one["v"].requires_grad
        with torch.no_grad():
            assert not fw.step(R.gated_delta, state, **one).y.requires_grad


def test_derivatives_forward_are_those_of_torch():
    given = signals(9)
    fw.scan(R.gated_delta, **given)
    with torch.autograd.forward_ad.dual_level():
        dual = {**given, "v": torch.autograd.forward_ad.make_dual(given["v"], torch.ones_like(given["v"]))}
        y = fw.scan(R.gated_delta, **dual).y
        _, tangent = torch.autograd.forward_ad.unpack_dual(y)
    assert torch.allclose(tangent, fw.scan(R.gated_delta, **{**given, "v": torch.ones_like(given["v"])}).y, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_a_tracer_sees_the_operator(grad):
    given = signals(9, grad)

    def run(q, k, v, beta, g):
        return fw.scan(R.gated_delta, q=q, k=k, v=v, beta=beta, g=g).y

    run(**given)
    traced = torch.jit.trace(run, tuple(given.values()), check_trace=False)
    other = {n: x.flip(1) for n, x in given.items()}
    assert torch.allclose(traced(*other.values()), run(**other), atol=1e-6)


def test_one_tensor_as_two_signals_is_known_again():
    given = signals(9)
    given["q"] = given["k"]
    prepared.known.calls.clear()
    for _ in range(3):
        fw.scan(R.gated_delta, **given)
    assert sum(map(len, prepared.known.calls.values())) == 1


def test_no_more_is_kept_than_is_meant_to_and_no_rule(monkeypatch):
    monkeypatch.setattr(prepared, "_MOST", 5)
    rules = []
    for T in range(1, 12):

        @fw.rule
        def mine(W, k: fw.Key, v: fw.Value):
            return W + fw.outer(v, k)

        rules.append(weakref.ref(mine))
        for again in (T, T + 20):
            fw.scan(mine, **{n: signals(again)[n] for n in "qkv"})
        assert sum(map(len, prepared.known.calls.values())) <= 5
    del mine
    gc.collect()
    assert not [r for r in rules if r() is not None]


def test_a_new_state_over_rows_of_the_old_one():
    """W has gaps between its rows, and the new state begins where it does: some heads would write over others that are still to come."""
    memory = torch.randn(2, 32, 128, 256, generator=torch.Generator().manual_seed(0))
    W, out = memory[..., :128], memory.flatten()[: 2 * 32 * 128 * 128].view(2, 32, 128, 128)
    one = {n: x[:, 0].float() for n, x in example(R.gated_delta, 2, 1, 32, 128, 128).items()}
    found = [x.clone() for x in fw.step(R.gated_delta, W.clone(), **one)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        new = fw.step(R.gated_delta, W, out=out, **one)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(new, found, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
