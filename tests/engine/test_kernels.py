"""The compiled kernels are the same function as the rule's own body, gradients included."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import AFFINE, R, name, state_for

import fastweights as fw
from fastweights import Key, KeyVector, LogDecay, Query, Rate, Value, outer
from fastweights.engine import cpu
from fastweights.engine.check import distance, example, gradients
from fastweights.engine.kernels import CHUNK, library

pytestmark = pytest.mark.skipif(library().lib is None, reason=f"no kernels: {library().why}")
EPS = torch.finfo(torch.float32).eps
# Allowed beside twice the recurrence's own rounding; four times as much for gradients. These are not derived: they were set above
# what was measured (up to 1e-6 for the gradient of a decay per head, 3 to 4 times the recurrence), and may only come down.
MORE = 12 * EPS


@fw.rule
def free_erase(W, k: Key, v: Value, x: KeyVector, y: KeyVector):
    return W + outer(W @ x, y) + outer(v, k)


@fw.rule
def old_read(W, q: Query, k: Key, v: Value, beta: Rate, g: LogDecay):
    return W * g.exp() + outer(beta * (v - W @ k), k), W @ q


def served(rule, signals, state):
    shapes = {n: tuple(x.shape[3:]) for n, x in signals.items()} | {n: tuple(s.shape[2:]) for n, s in zip(rule.states, state, strict=True)}
    return not isinstance(cpu.operands(rule.trace_for(shapes).program), str)


def cases():
    """Every rule that the kernels serve, with decays per head and per channel: all nine classes."""
    for rule in [*AFFINE, free_erase, old_read, R.gated_delta * 3, R.gated_delta.T, R.delta >> R.gated_delta]:
        for pick in rule.shapes:
            signals = example(rule, 1, 1, 1, 5, 3, per_channel=pick == -1)
            if served(rule, signals, state_for(rule, 1, 1, 5, 3)):
                yield pytest.param(rule, pick == -1, id=f"{name(rule)}{' per channel' if pick == -1 else ''}")


CASES = list(cases())


def single(signals):
    return {n: x.float() for n, x in signals.items()}


def parts(out):
    return [out.y, *(out.state if isinstance(out.state, tuple) else (out.state,))]


def lost(e):
    """What numbers below the normal ones, which are zeros in the kernels, can take of a norm."""
    return torch.finfo(torch.float32).tiny * e.numel() ** 0.5 / e.norm().item()


def close(found, rounded, exact, more=MORE):
    for a, r, e in zip(found, rounded, exact, strict=True):
        if e.numel() and e.norm() > 0:
            assert distance(a, e) <= 2 * distance(r, e) + more + lost(e)
        else:
            assert not a.numel() or a.abs().max() < 1e-5


def compare(rule, signals, state, reset=None, grad=True):
    """Against the body in float64, with the rounding of the body in float32 for comparison."""
    low, start = single(signals), tuple(s.float() for s in state)
    exact = fw.scan(rule, **signals, state=state, reset=reset, form="recurrent")
    rounded = fw.scan(rule, **low, state=start, reset=reset, form="recurrent")
    found = fw.scan(rule, **low, state=start, reset=reset, backend="cpu")
    close(parts(found), parts(rounded), parts(exact))
    if grad:
        slopes = [gradients(rule, s, w, reset=reset, **how) for s, w, how in (
            (low, start, {"backend": "cpu"}), (low, start, {"form": "recurrent"}), (signals, state, {"form": "recurrent"}))]  # fmt: skip
        close(*slopes, more=4 * MORE)


def test_tiny_numbers_are_zeros_in_the_kernels_alone():
    """A state that decays passes below the normal numbers, where processors are a hundred times slower; other code keeps them."""
    state = torch.full((1, 2, 4, 4), 1e-35)
    out = fw.scan(R.decay, q=torch.ones(1, 8, 2, 4), g=torch.full((1, 8, 2), -1.5), state=state, backend="cpu")
    want = 1e-35 * torch.exp(torch.tensor(-1.5, dtype=torch.float64) * 8)
    assert want < torch.finfo(torch.float32).tiny
    assert (out.state == 0).all()
    assert (torch.full((1000,), 1e-30) * 1e-10 > 0).all()


@pytest.mark.parametrize(("rule", "usual"), [(R.hebb, True), (R.gated_delta, True), (R.gated_delta * 3, False), (R.gated_delta.T, False)])
def test_a_plan_says_how_many_tokens_are_taken_together(rule, usual):
    signals = single(example(rule, 1, 40, 1, 8, 8))
    tokens = fw.plan(rule, **signals).chunk_size
    assert tokens in (2, 4, 8) if usual else tokens == CHUNK // (3 if rule == R.gated_delta * 3 else 1)


def test_all_nine_classes_are_served():
    found = set()
    for case in CASES:
        rule, per_channel = case.values
        program = rule.trace_for(
            {n: s.shapes(4, 3)[-1 if per_channel else 0] for part in (rule.states, rule.signals) for n, s in part.items()}
        ).program
        found.add((program.decay, program.erase))
    assert found == {(d, e) for d in ("none", "scalar", "key") for e in ("none", "tied", "free")}


@pytest.mark.parametrize(("rule", "per_channel"), CASES)
def test_kernels_agree_with_the_body(rule, per_channel):
    for T, H, K, V, seed in ((0, 1, 3, 2, 0), (1, 2, 5, 3, 1), (37, 2, 19, 33, 2), (130, 1, 8, 5, 3)):
        signals, state = example(rule, 2, T, H, K, V, per_channel=per_channel, seed=seed), state_for(rule, 2, H, K, V)
        compare(rule, signals, state, grad=T > 0)


@pytest.mark.parametrize(("rule", "per_channel"), CASES)
def test_resets_and_splits(rule, per_channel):
    signals, state = example(rule, 2, 70, 2, 6, 9, per_channel=per_channel), state_for(rule, 2, 2, 6, 9)
    reset = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    compare(rule, signals, state, reset)
    low, start = single(signals), tuple(s.float() for s in state)
    whole = fw.scan(rule, **low, state=start, backend="cpu")
    for cut in (1, 16, 33):
        first = fw.scan(rule, **{n: x[:, :cut] for n, x in low.items()}, state=start, backend="cpu")
        rest = fw.scan(rule, **{n: x[:, cut:] for n, x in low.items()}, state=first.state, backend="cpu")
        assert distance(torch.cat([first.y, rest.y], 1), whole.y) < 1e-5


@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 64), (64, 64), (128, 128), (256, 256), (1, 40), (100, 1)])
@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.generalised_delta], ids=name)
def test_sizes(rule, K, V):
    for pick in rule.shapes:
        if K > 1 or pick == 0:
            compare(rule, example(rule, 1, 40, 1, K, V, per_channel=pick == -1), state_for(rule, 1, 1, K, V), grad=K < 256)


FUZZED = [
    R.hebb, R.decayed_hebb, R.delta, R.gated_delta, R.generalised_delta, R.erase_write, R.comba, R.gated_oja, R.delta * 2,
    free_erase, old_read,
]  # fmt: skip


def fuzz(rule, draw):
    B, T, groups, K, V = (draw(st.integers(lo, hi)) for lo, hi in ((1, 3), (1, 50), (1, 3), (2, 40), (1, 40)))
    H = groups * draw(st.integers(1, 3))
    signals = example(rule, B, T, H, K, V, per_channel=draw(st.booleans()) and rule.shapes[-1] == -1, seed=draw(st.integers(0, 99)))
    for n, x in signals.items():
        if n in ("q", "k") and draw(st.booleans()):
            x = x[:, :, :groups]
        how = draw(st.sampled_from(["as it is", "time is the fastest axis", "every second number", "the same for all tokens"]))
        if how == "time is the fastest axis":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif how == "every second number":
            x = torch.stack([x, x + 1], -1)[..., 0]
        elif how == "the same for all tokens":
            x = x[:, :1].expand(-1, T, *x.shape[2:])
        signals[n] = x
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < draw(st.sampled_from([0, 0.1, 0.9]))
    return signals, state_for(rule, B, H, K, V), draw(st.sampled_from([None, reset]))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rule=st.sampled_from(
        [
            R.hebb,
            R.decayed_hebb,
            R.delta,
            R.gated_delta,
            R.generalised_delta,
            R.erase_write,
            R.comba,
            R.gated_oja,
            R.delta * 2,
            free_erase,
            old_read,
        ]
    ),
)
def test_any_shapes_strides_and_flags(data, rule):
    signals, state, reset = fuzz(rule, data.draw)
    low, start = {n: x.to(torch.float32) for n, x in signals.items()}, tuple(s.float() for s in state)
    exact = fw.scan(rule, **{n: x.double() for n, x in low.items()}, state=tuple(s.double() for s in start), reset=reset, form="recurrent")
    found = fw.scan(rule, **low, state=start, reset=reset, backend="cpu")
    for a, e in zip(parts(found), parts(exact), strict=True):
        assert (a - e).norm() <= 3e-6 * (e.norm() + start[0].norm())
    ours, theirs = (
        gradients(rule, {n: x.to(d) for n, x in low.items()}, tuple(s.to(d) for s in start), reset=reset, **how)
        for d, how in ((torch.float32, {"backend": "cpu"}), (torch.float64, {"form": "recurrent"}))
    )
    scale = max(t.norm() for t in theirs)
    for a, e in zip(ours, theirs, strict=True):
        assert (a - e).norm() <= 1e-5 * (e.norm() + 0.1 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.comba], ids=name)
def test_sixteen_bits(rule, dtype):
    """The state and all sums are float32: what is rounded is the input (exactly given here) and once each output."""
    signals = {n: x.to(torch.float32 if rule.signals[n].role.log_decay else dtype) for n, x in example(rule, 2, 50, 2, 24, 17).items()}
    state = tuple(s.float() for s in state_for(rule, 2, 2, 24, 17))
    exact = fw.scan(rule, **{n: x.double() for n, x in signals.items()}, state=tuple(s.double() for s in state), form="recurrent")
    found = fw.scan(rule, **signals, state=state, backend="cpu")
    assert found.y.dtype == dtype
    assert found.state.dtype == torch.float32
    assert ((found.y.double() - exact.y).abs() <= torch.finfo(dtype).eps / 2 * exact.y.abs() * 1.01 + 2e-6).all()
    assert distance(found.state, exact.state) < 1e-6
    for g, e in zip(
        gradients(rule, signals, state, backend="cpu"),
        gradients(rule, {n: x.double() for n, x in signals.items()}, tuple(s.double() for s in state), form="recurrent"),
        strict=True,
    ):
        assert distance(g, e) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.generalised_delta], ids=name)
@pytest.mark.parametrize("per_channel", [False, True])
def test_extreme_decays(rule, per_channel):
    signals, state = example(rule, 1, 60, 2, 6, 4, per_channel=per_channel), state_for(rule, 1, 2, 6, 4)
    for value in (0.0, -1e-8, -30.0, -50.0, -1e4, -torch.inf):
        g = signals["g"].clone()
        g[:, 7::3] = value
        compare(rule, signals | {"g": g}, state, grad=value > -torch.inf)
    whole = gradients(rule, single(signals | {"g": torch.full_like(g, -torch.inf)}), tuple(s.float() for s in state), backend="cpu")
    assert all(x.isfinite().all() for x in whole)


@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.generalised_delta], ids=name)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_decay_that_waits(rule, per_channel):
    """W is multiplied by its decays only now and then: where they are weak, strong, both in turn, and up to a reset."""
    signals, state = example(rule, 1, 150, 2, 6, 4, per_channel=per_channel), state_for(rule, 1, 2, 6, 4)
    strong = torch.rand(signals["g"].shape, generator=torch.Generator().manual_seed(0)) < 0.1
    reset = torch.zeros(1, 150, dtype=torch.bool)
    reset[0, 90] = True
    for weak in (0.0, -0.02, -0.6):
        g = torch.full_like(signals["g"], weak)
        for mixed in (g, torch.where(strong, -9.0, g)):
            compare(rule, signals | {"g": mixed}, state)
            compare(rule, signals | {"g": mixed}, state, reset)


def test_rates_of_zero_have_a_gradient():
    signals, state = example(R.gated_delta, 1, 40, 1, 6, 4), state_for(R.gated_delta, 1, 1, 6, 4)
    compare(R.gated_delta, signals | {"beta": torch.zeros_like(signals["beta"])}, state)


@pytest.mark.parametrize("rule", [R.hebb, R.gated_delta, R.generalised_delta], ids=name)
def test_what_is_not_a_number_stays_where_it_arose(rule):
    low, start = single(example(rule, 2, 40, 2, 20, 6)), tuple(s.float() for s in state_for(rule, 2, 2, 20, 6))
    clean = fw.scan(rule, **low, state=start, backend="cpu")
    for n in low:
        bad = {m: x.clone() for m, x in low.items()}
        bad[n][1, 21, 0] = torch.nan
        y = fw.scan(rule, **bad, state=start, backend="cpu").y
        assert torch.equal(y[0], clean.y[0])
        assert torch.equal(y[1, :, 1], clean.y[1, :, 1])
        assert torch.equal(y[1, :21, 0], clean.y[1, :21, 0])
        assert y[1, 21, 0].isnan().any()


def test_a_positive_decay_is_refused():
    low = single(example(R.gated_delta, 1, 30, 1, 6, 4))
    low["g"][0, 20] = 0.1
    with pytest.raises(fw.SignalError, match="must be <= 0"):
        fw.scan(R.gated_delta, **low, backend="cpu")
    one = {n: x[:, 20] * 1 for n, x in low.items()}
    W = torch.zeros(1, 1, 4, 6)
    fw.step(R.gated_delta, W, **one | {"g": one["g"] * -1})  # prepares the call, which then looks at no value but in the kernel
    with pytest.raises(fw.SignalError, match="log decay is positive"):
        fw.step(R.gated_delta, W, **one)


@pytest.mark.parametrize("rule", [R.gated_delta, R.gated_oja], ids=name)
def test_threads_and_batches_change_no_bit(rule):
    low, start = single(example(rule, 3, 70, 4, 20, 24)), tuple(s.float() for s in state_for(rule, 3, 4, 20, 24))
    reset = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3, 8):  # many threads take heads one by one, few take them abreast
            torch.set_num_threads(n)
            out = fw.scan(rule, **low, state=start, reset=reset, backend="cpu")
            found.append([*parts(out), *gradients(rule, low, start, reset=reset, backend="cpu")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    alone = fw.scan(rule, **{n: x[1:2] for n, x in low.items()}, state=tuple(s[1:2] for s in start), reset=reset[1:2], backend="cpu")
    assert torch.equal(alone.y, found[0][0][1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [64, 40])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.generalised_delta], ids=name)
def test_results_that_go_past_the_caches_are_those_that_stay(rule, per_channel, K, dtype):
    B, T, H, V = 4, 1037, 2, 64
    low = {n: x.to(dtype) for n, x in example(rule, B, T, H, K, V, per_channel=per_channel).items()}
    start = state_for(rule, B, H, K, V)[0].float()
    given = {"state": start, **low, "d": torch.randn(B, T, H, V, generator=torch.Generator().manual_seed(0)).to(dtype)}

    def everything(state, d, **signals):
        leaves = [x.clone().requires_grad_() for x in (state, *signals.values())]
        out = fw.scan(rule, **dict(zip(signals, leaves[1:], strict=True)), state=leaves[0], backend="cpu")
        return out.y, out.state, *torch.autograd.grad(out.y, leaves, d)

    many = everything(**given)
    for b in range(B):
        alone = everything(**{n: x[b : b + 1] for n, x in given.items()})
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(many, alone, strict=True))


def test_several_python_threads_at_once():
    low = single(example(R.gated_delta, 2, 300, 2, 32, 32))
    want, wrong = fw.scan(R.gated_delta, **low, backend="cpu").y, []

    def work():
        for _ in range(10):
            wrong.extend([] if torch.equal(fw.scan(R.gated_delta, **low, backend="cpu").y, want) else [1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_process_runs_them():
    """As a DataLoader worker does, after the parent has used its threads."""
    program = """
import os, torch, fastweights as fw
k = torch.nn.functional.normalize(torch.randn(2, 100, 2, 16), dim=-1)
run = lambda: fw.scan(fw.rules.delta, q=k, k=k, v=k, beta=torch.ones(2, 100, 2), backend="cpu").y
want = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), want) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_kernels_torch_serves_and_says_so():
    program = "import torch, fastweights as fw; k = torch.ones(1, 4, 1, 2); print(fw.plan(fw.rules.hebb, q=k, k=k, v=k))"
    out = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"FASTWEIGHTS_ISA": "none"}, capture_output=True, text=True, check=True
    )
    assert "backend torch" in out.stdout
    assert "FASTWEIGHTS_ISA is none" in out.stdout


@pytest.mark.parametrize("rule", [r for r in R.CATALOGUE if "q" in r.signals], ids=name)
def test_step_is_a_scan_of_one_token(rule):
    for pick in rule.shapes:
        for K, V in ((5, 7), (33, 20), (32, 32)):
            one = {n: x[:, 0].float() for n, x in example(rule, 2, 1, 4, K, V, per_channel=pick == -1).items()}
            W = tuple(s.float() for s in state_for(rule, 2, 4, K, V))
            W = W[0] if len(W) == 1 else W
            found, want = fw.step(rule, W, **one), fw.step(rule, W, **one, backend="torch")
            assert all(distance(a, b) < 1e-6 for a, b in zip(parts(found), parts(want), strict=True))


def test_step_in_place():
    one, W = {n: x[:, 0] for n, x in single(example(R.gated_delta, 1, 1, 2, 16, 16)).items()}, torch.randn(1, 2, 16, 16)
    want, before = fw.step(R.gated_delta, W, **one), W.clone()
    assert torch.equal(W, before)
    found = fw.step(R.gated_delta, W, out=W, **one)
    assert found.state is W
    assert torch.equal(W, want.state)
    assert torch.equal(found.y, want.y)
    with pytest.raises(fw.SignalError, match="out is"):
        fw.step(R.gated_delta, before, out=torch.zeros(2, 2), **one)


def test_refusals_name_the_reason():
    low = single(example(R.delta, 1, 5, 1, 4, 4))
    for how, why in (
        ({"form": "parallel"}, "the kernels run form 'chunk'"),
        ({"chunk_size": 4}, "the kernels have their own"),
    ):
        with pytest.raises(fw.FormError, match=why):
            fw.scan(R.delta, **low, backend="cpu", **how)
    with pytest.raises(fw.FormError, match="float64"):
        fw.scan(R.delta, **{n: x.double() for n, x in low.items()}, backend="cpu")


@pytest.mark.parametrize("rule", [R.hebb, R.gated_delta, R.generalised_delta], ids=name)
def test_the_operator_is_registered_in_full(rule):
    """Its schema, its shapes on fake tensors, its gradient: what torch.compile and torch.export build on."""
    low, state = single(example(rule, 1, 40, 2, 8, 8)), torch.zeros(1, 2, 8, 8)
    shapes = {n: tuple(x.shape[3:]) for n, x in low.items()} | {"W": (8, 8)}
    program = rule.trace_for(shapes).program
    names = {leaf: n for n, leaf in program.leaves.items()}
    found = cpu.operands(program)
    tensors = [low[names[e]].requires_grad_() for e in found.tensors]
    arguments = (tensors, state, None, list(found.spec), list(found.scales), torch.float32, True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastweights.scan.default, arguments, test_utils=tests)

    compiled = torch.compile(lambda *t: torch.ops.fastweights.scan(list(t), *arguments[1:])[0] * 2, fullgraph=True, backend="aot_eager")
    y = compiled(*tensors)
    assert torch.equal(y, torch.ops.fastweights.scan(*arguments)[0] * 2)
    y.sum().backward()
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("rule", [R.gated_delta, R.normalised_hebb, R.oja], ids=name)
def test_compiled_in_one_graph(rule):
    low = single(example(rule, 1, 40, 2, 8, 8))

    def whole(*tensors):
        return fw.scan(rule, **dict(zip(low, tensors, strict=True))).y * 2

    def token(*tensors):
        return fw.step(rule, None, **dict(zip(low, tensors, strict=True))).y * 2

    torch.compiler.reset()
    leaves = [x.clone().requires_grad_() for x in low.values()]
    y, want = torch.compile(whole, fullgraph=True, backend="aot_eager")(*leaves), whole(*leaves)
    assert torch.equal(y, want)
    slopes = [torch.autograd.grad(out.sum(), leaves) for out in (y, want)]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    one = [x[:, 0] for x in low.values()]
    assert torch.allclose(torch.compile(token, fullgraph=True, backend="aot_eager")(*one), token(*one), atol=1e-6)


def test_the_compiler_is_not_imported_before_it_is_used():
    """It takes a second to import."""
    program = "import sys, torch, fastweights; raise SystemExit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_compiled_layer():
    layer, x = fw.FastWeightLayer(R.gated_delta, 32, heads=2), torch.randn(1, 20, 32)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], layer(x)[0], atol=1e-6)


def test_a_second_derivative_is_right_or_refused():
    low = single(example(R.delta, 1, 5, 1, 4, 4))
    beta = low["beta"].requires_grad_()
    y = fw.scan(R.delta, **low | {"beta": beta}, backend="cpu").y
    (slope,) = torch.autograd.grad(y.square().sum(), beta, create_graph=True)
    with pytest.raises(fw.FormError, match="backend='torch'"):
        slope.sum().backward()


@pytest.mark.slow
def test_a_million_tokens():
    T = 1_000_000
    k = torch.nn.functional.normalize(torch.randn(1, T, 1, 8), dim=-1)
    beta, g = torch.rand(1, T, 1), -torch.rand(1, T, 1) * 0.01
    signals = {"q": k, "k": k, "v": k, "beta": beta, "g": g}
    y, W = fw.scan(R.gated_delta, **signals, backend="cpu")
    half = fw.scan(R.gated_delta, **{n: x[:, : T // 2].double() for n, x in signals.items()}).y
    assert y.isfinite().all()
    assert distance(y[:, : T // 2], half) < 1e-6
    assert W.isfinite().all()


def test_a_prepared_call_still_refuses_an_unknown_backend():
    low = single(example(R.delta, 1, 5, 1, 4, 4))
    one, W = {n: x[:, 0] for n, x in low.items()}, torch.zeros(1, 1, 4, 4)
    for _ in range(2):  # the second time the call is known
        for call in (lambda: fw.scan(R.delta, **low, backend="nope"), lambda: fw.step(R.delta, W, **one, backend="nope")):
            with pytest.raises(fw.SignalError, match="unknown backend 'nope'"):
                call()
        fw.scan(R.delta, **low)
        fw.step(R.delta, W, **one)


@pytest.mark.parametrize(
    ("rule", "channels"), [(R.gated_delta, False), (R.gated_delta, True), (R.hebb, False), (R.generalised_delta, True)]
)
@pytest.mark.parametrize(("K", "V"), [(5, 7), (64, 32), (16, 33)])
def test_a_step_takes_a_state_whose_values_lie_side_by_side(rule, channels, K, V):
    """As transformers keeps it: (keys x values)."""
    signals = {n: x[:, 0] for n, x in example(rule, 2, 1, 3, K, V, per_channel=channels).items()}
    W = torch.randn(2, 3, K, V, dtype=torch.float64).transpose(-1, -2)
    exact = fw.step(rule, W, **signals)
    kept = W.float().transpose(-1, -2).contiguous()
    y, _ = fw.step(rule, kept.transpose(-1, -2), out=kept.transpose(-1, -2), **single(signals))
    close((y, kept.transpose(-1, -2)), (exact.y.float(), exact.state.float()), exact)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_shared_keys_of_many_heads(heads):
    """Heads that share a key are summed a few at a time, in an order that nothing else changes."""
    signals = example(R.gated_delta, 2, 40, 12, 16, 8)
    low = {n: x.float()[:, :, :heads] if n in ("q", "k") else x.float() for n, x in signals.items()}
    W = torch.zeros(2, 12, 8, 16)
    exact = gradients(R.gated_delta, {n: x.double() for n, x in low.items()}, (W.double(),), form="recurrent")
    found = gradients(R.gated_delta, low, (W,), backend="cpu")
    rounded = gradients(R.gated_delta, low, (W,), form="recurrent")
    close(found, rounded, exact, more=4 * MORE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(gradients(R.gated_delta, low, (W,), backend="cpu"), found, strict=True))
    finally:
        torch.set_num_threads(before)
