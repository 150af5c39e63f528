"""What a user may rely on beside the numbers: resets, heads, containment, extremes, linear cost, dtypes."""

import pytest
import torch
from rows import AFFINE, R, name, state_for
from torch.utils.flop_counter import FlopCounterMode

import fastweights as fw
from fastweights.engine.check import distance, example
from fastweights.engine.kernels import library

PROGRAM_FORMS = ["recurrent", "parallel", "chunk"]


def parts(out):
    return (out.y, *(out.state if isinstance(out.state, tuple) else (out.state,)))


@pytest.mark.parametrize("rule", AFFINE, ids=name)
def test_reset_is_a_fresh_start(rule):
    signals, start = example(rule, 2, 20, 2, 4, 3), state_for(rule, 2, 2, 4, 3)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, [5, 6, 17]] = True
    for form in PROGRAM_FORMS:
        out = fw.scan(rule, **signals, state=start, reset=reset, form=form, **({"chunk_size": 4} if form == "chunk" else {}))
        pieces = [slice(0, 5), slice(5, 6), slice(6, 17), slice(17, 20)]
        empty = tuple(torch.zeros_like(s) for s in start)
        runs = [fw.scan(rule, **{n: x[:, p] for n, x in signals.items()}, state=empty if i else start) for i, p in enumerate(pieces)]
        assert distance(out.y, torch.cat([r.y for r in runs], 1)) < 1e-12
        assert all(distance(a, b) < 1e-12 for a, b in zip(parts(out)[1:], parts(runs[-1])[1:], strict=True))


@pytest.mark.parametrize("rule", [R.gated_delta, R.generalised_delta, R.normalised_hebb, R.oja, R.bonus_hebb, R.exp_gated_hebb], ids=name)
@pytest.mark.parametrize("few", [{"q": 1, "k": 2}, {"q": 2, "k": 3}, {"k": 1}, {"q": 3}])
def test_grouped_heads_are_repeated_heads(rule, few):
    signals = example(rule, 2, 9, 6, 4, 3)
    for n, heads in few.items():
        signals[n] = signals[n][:, :, :heads]
    repeated = {n: x.repeat_interleave(6 // x.shape[2], 2) for n, x in signals.items()}
    for form in PROGRAM_FORMS:
        out, want = fw.scan(rule, **signals, form=form), fw.scan(rule, **repeated, form="recurrent")
        assert all(distance(a, b) < 1e-12 for a, b in zip(parts(out), parts(want), strict=True))


@pytest.mark.parametrize("rule", AFFINE, ids=name)
@pytest.mark.parametrize("form", PROGRAM_FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_head_and_future(rule, form, poison):
    clean = example(rule, 2, 12, 2, 4, 3)
    want = fw.scan(rule, **clean, state=state_for(rule, 2, 2, 4, 3), form=form)
    for n in clean:
        if rule.signals[n].role.log_decay and poison > 0:
            continue  # refused: a positive log decay
        signals = {m: x.clone() for m, x in clean.items()}
        signals[n][1, 5, 0] = poison
        out = fw.scan(rule, **signals, state=state_for(rule, 2, 2, 4, 3), form=form)
        assert torch.allclose(out.y[0], want.y[0], rtol=1e-12)
        assert torch.allclose(out.y[1, :, 1], want.y[1, :, 1], rtol=1e-12)
        assert torch.allclose(out.y[1, :5, 0], want.y[1, :5, 0], rtol=1e-12)


@pytest.mark.parametrize("form", PROGRAM_FORMS)
def test_a_reset_cures_a_nan(form):
    signals = example(R.gated_delta, 1, 9, 1, 4, 3)
    signals["k"][0, 2] = float("nan")
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 6] = True
    out = fw.scan(R.gated_delta, **signals, reset=reset, form=form)
    assert out.y[0, 2:6].isnan().all()
    assert out.y[0, 6:].isfinite().all()
    assert out.state.isfinite().all()


@pytest.mark.parametrize("g", [0.0, -1e-8, -30.0, -1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_are_finite_with_finite_gradients(g, dtype):
    for rule in (R.decayed_hebb, R.gated_delta, R.generalised_delta, R.gated_oja):
        for pick in rule.shapes:
            signals = example(rule, 1, 70, 1, 4, 4, per_channel=pick == -1, dtype=dtype)
            signals["g"] = torch.full_like(signals["g"], g)
            signals = {n: x.requires_grad_() for n, x in signals.items()}
            for form in PROGRAM_FORMS:
                y, state = fw.scan(rule, **signals, form=form)
                found = torch.autograd.grad(y.square().sum() + state.sum(), list(signals.values()))
                assert y.isfinite().all()
                assert all(x.isfinite().all() for x in found)


def test_a_decay_of_zero_has_its_gradient():
    """W * (1 - beta) at beta = 1: the derivative with respect to the decay is W itself, in every form."""
    from rows import moving_average

    signals = example(moving_average, 1, 9, 1, 3, 2)
    signals["beta"] = torch.ones_like(signals["beta"])
    signals["beta"].requires_grad_()
    start = state_for(moving_average, 1, 1, 3, 2)
    found = [
        torch.autograd.grad(fw.scan(moving_average, **signals, state=start, form=form).y.sum(), signals["beta"])[0]
        for form in PROGRAM_FORMS
    ]
    assert found[0].abs().min() > 0
    assert all(distance(g, found[0]) < 1e-12 for g in found[1:])


def test_a_million_tokens():
    T = 1_000_000
    for rule, g in ((R.gated_delta, -1e-3), (R.decayed_hebb, -1e-6)):
        signals = {n: x.expand(1, T, *x.shape[2:]) for n, x in example(rule, 1, 1, 1, 4, 4, dtype=torch.float32).items()}
        signals["g"] = torch.full((1, T, 1), g)
        with torch.no_grad():
            y, state = fw.scan(rule, **signals)
        assert y.isfinite().all()
        assert state.isfinite().all()


@pytest.mark.parametrize("rule", [R.hebb, R.gated_delta, R.generalised_delta, R.exp_gated_hebb, R.oja, R.delta * 2], ids=name)
def test_the_chunk_form_is_linear_in_time_and_memory(rule):
    """Arithmetic and what is kept for the backward pass double with T."""

    def cost(T):
        signals = {n: x.requires_grad_() for n, x in example(rule, 1, T, 2, 8, 8, per_channel=rule.shapes[-1] == -1).items()}
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), FlopCounterMode(display=False) as counter:
            y = fw.scan(rule, **signals, form="chunk", chunk_size=16).y
            y.sum().backward()
        return counter.get_total_flops(), kept

    (flops, kept), (flops2, kept2) = cost(2048), cost(4096)
    assert 1.9 < flops2 / flops < 2.1
    assert 1.9 < kept2 / kept < 2.1


def test_dtypes():
    for dtype in (torch.bfloat16, torch.float16):
        signals = example(R.gated_delta, 1, 20, 2, 8, 8, dtype=dtype)
        y, state = fw.scan(R.gated_delta, **signals)
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        exact = fw.scan(R.gated_delta, **{n: x.double() for n, x in signals.items()}).y
        assert distance(y, exact) < 2 * torch.finfo(dtype).eps
        mixed = signals | {"g": signals["g"].float(), "beta": signals["beta"].float()}
        assert torch.equal(fw.scan(R.gated_delta, **mixed).y, y)
    y, state = fw.scan(R.gated_delta, **example(R.gated_delta))
    assert y.dtype == state.dtype == torch.float64


def test_a_step_is_a_scan_of_one_token():
    for rule in (R.gated_delta, R.exp_gated_hebb, R.delta * 2):
        signals, start = example(rule, 2, 6, 2, 4, 3), state_for(rule, 2, 2, 4, 3)
        whole = fw.scan(rule, **signals, state=start)
        state, ys = start, []
        for t in range(6):
            y, state = fw.step(rule, state, **{n: x[:, t] for n, x in signals.items()})
            ys.append(y)
        assert distance(torch.stack(ys, 1), whole.y) < 1e-12


def test_unroll_shows_every_state():
    signals = example(R.gated_delta, 1, 7, 2, 4, 3)
    Ws = fw.unroll(R.gated_delta, **{n: x for n, x in signals.items() if n != "q"})
    assert Ws.shape == (1, 7, 2, 3, 4)
    out = fw.scan(R.gated_delta, **signals)
    assert distance(torch.einsum("bthvk,bthk->bthv", Ws, signals["q"]), out.y) < 1e-12
    assert distance(Ws[:, -1], out.state) < 1e-12


@pytest.mark.parametrize("rule", [R.hebb, R.gated_delta, R.generalised_delta, R.bonus_hebb, R.normalised_hebb, R.comba], ids=name)
def test_the_attention_matrix_times_the_values_is_the_output(rule):
    signals = example(rule, 2, 13, 2, 5, 3)
    A = fw.attention_matrix(rule, **{n: x for n, x in signals.items() if n != "v"})
    assert A.shape == (2, 2, 13, 13)
    assert A.triu(1).abs().max() == 0
    y = fw.scan(rule, **signals).y
    assert distance(torch.einsum("bhts,bshv->bthv", A, signals["v"]), y) < 1e-12


@pytest.mark.parametrize("rule", [R.oja, R.erase, R.erase_write, R.delta * 2], ids=name)
def test_rules_without_an_attention_matrix_say_so(rule):
    signals = {n: x for n, x in example(rule).items() if n != "v"}
    with pytest.raises(fw.FormError, match=r"attention matrix|no value v"):
        fw.attention_matrix(rule, **signals)


def test_plan_tells_what_runs():
    signals = example(R.delta, 1, 100, 2, 16, 16, dtype=torch.float32)
    chosen = fw.plan(R.delta, **signals)
    assert (chosen.form, chosen.backend, chosen.chunk_size) == (("chunk", "cpu", 4) if library().lib else ("chunk", "torch", 16))
    assert "tied" in chosen.why
    on_torch = fw.plan(R.delta, **signals, backend="torch")
    assert (on_torch.form, on_torch.backend, on_torch.chunk_size) == ("chunk", "torch", 16)
    assert "float64" in fw.plan(R.delta, **signals, form="parallel").why
    assert fw.plan(R.delta, **{n: x[:, :1] for n, x in signals.items()}, backend="torch").form == "recurrent"


def test_batch_rows_do_not_know_each_other():
    signals, start = example(R.gated_delta, 3, 40, 2, 8, 8, dtype=torch.float32), state_for(R.gated_delta, 3, 2, 8, 8, torch.float32)
    whole = fw.scan(R.gated_delta, **signals, state=start)
    alone = fw.scan(R.gated_delta, **{n: x[1:2] for n, x in signals.items()}, state=tuple(s[1:2] for s in start))
    assert distance(whole.y[1:2], alone.y) < 1e-6


@pytest.mark.parametrize("rule", [R.gated_delta, R.normalised_hebb, R.srwm], ids=name)
def test_a_state_that_nothing_changed_is_still_a_new_one(rule):
    signals, start = example(rule, 1, 0, 2, 4, 4), state_for(rule, 1, 2, 4, 4)
    for form in rule.forms:
        out = fw.scan(rule, **signals, state=start, form=form)
        for old, new in zip(start, parts(out)[1:], strict=True):
            assert torch.equal(old, new)
            assert old.data_ptr() != new.data_ptr()


@fw.rule
def still(W, k: fw.Key, v: fw.Value):
    return W


@pytest.mark.parametrize("rule", [R.hebb, R.gated_delta, R.normalised_hebb, R.softmax_delta, R.momentum], ids=name)
def test_no_tokens_have_gradients_of_zero(rule):
    signals = {n: x.requires_grad_() for n, x in example(rule, 2, 0, 2, 3, 3).items()}
    start = tuple(s.requires_grad_() for s in state_for(rule, 2, 2, 3, 3))
    y = fw.scan(rule, **signals, state=start).y
    assert y.shape[1] == 0
    for x, g in zip((*signals.values(), *start), torch.autograd.grad(y.sum(), (*signals.values(), *start)), strict=True):
        assert torch.equal(g, torch.zeros_like(x))


def test_no_way_of_running_returns_the_memory_of_the_caller():
    k, W = torch.randn(1, 5, 1, 4), torch.randn(1, 1, 4, 4)

    def run(W):
        return fw.scan(still, q=k, k=k, v=k, state=W, backend="torch").state

    for result in (run(W), torch.compile(run, backend="aot_eager")(W), fw.step(still, W, q=k[:, 0], k=k[:, 0], v=k[:, 0])[1]):
        assert torch.equal(result, W)
        result.zero_()
        assert W.any()


def test_a_state_may_be_written_over_a_part_of_the_old_one():
    signals = {n: x[:, 0].float() for n, x in example(R.delta, 1, 1, 1, 16, 32).items()}
    memory = torch.randn(34, 16)
    for shift in (1, 2):
        room = memory.clone()
        W, out = room[None, None, :32], room[None, None, shift : 32 + shift]
        expected = fw.step(R.delta, W.clone(), **signals)[1]
        fw.step(R.delta, W, out=out, **signals)
        assert torch.allclose(out, expected, atol=1e-6)
