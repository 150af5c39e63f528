"""The central theorem: every form of every affine rule is the same function."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import TOKEN, run
from rows import AFFINE, NOT_AFFINE, R, name, state_for

import fastweights as fw
from fastweights.engine.check import Output, distance, example, gradients

FORMS = [("parallel", None), ("chunk", 1), ("chunk", 7), ("chunk", 64)]
IDS = [f if c is None else f"{f}{c}" for f, c in FORMS]


def how(form, chunk):
    return {"form": form} | ({"chunk_size": chunk} if chunk else {})


def states(out):
    return out.state if isinstance(out.state, tuple) else (out.state,)


TINY = torch.finfo(torch.float32).tiny  # numbers below are zeros in the kernels


def error(out: Output, want: Output) -> float:
    return max(distance(a, b) for a, b in zip((out.y, *states(out)), (want.y, *states(want)), strict=True))


def off(out: Output, want: Output, start) -> float:
    """The error relative to the result or to the first state, whichever is larger: what cancels to zero has no digits left."""
    scale = max(s.norm().item() for s in start)
    return max(
        ((a - b).norm() / max(b.norm().item(), scale)).item() for a, b in zip((out.y, *states(out)), (want.y, *states(want)), strict=True)
    )


@pytest.mark.parametrize("rule", R.CATALOGUE, ids=name)
def test_the_body_is_what_the_papers_say(rule):
    assert set(TOKEN) == {r.name for r in R.CATALOGUE}
    for pick in rule.shapes:
        signals = example(rule, 2, 9, 2, 5, 3, per_channel=pick == -1)
        start = state_for(rule, 2, 2, 5, 3)
        y, final = run(rule, signals, dict(zip(rule.states, start, strict=True)))
        for form in rule.forms:
            out = fw.scan(rule, **signals, state=start, form=form)
            want = Output(torch.tensor(y), tuple(torch.tensor(np.asarray(final[n])) for n in rule.states))
            assert error(out, want) < 1e-12


@pytest.mark.parametrize("rule", AFFINE, ids=name)
@pytest.mark.parametrize(("form", "chunk"), FORMS, ids=IDS)
def test_forms_agree(rule, form, chunk):
    assert rule.forms == ("recurrent", "parallel", "chunk")
    for pick in rule.shapes:
        for T in (0, 1, 2, 7, 65):
            signals = example(rule, 2, T, 2, 5, 3, per_channel=pick == -1, seed=T)
            start = state_for(rule, 2, 2, 5, 3)
            want = fw.scan(rule, **signals, state=start, form="recurrent")
            assert error(fw.scan(rule, **signals, state=start, **how(form, chunk)), want) < 1e-10


@pytest.mark.parametrize("rule", AFFINE, ids=name)
def test_gradients_agree(rule):
    for pick in rule.shapes:
        signals, start = example(rule, 1, 19, 2, 4, 3, per_channel=pick == -1), state_for(rule, 1, 2, 4, 3)
        want = torch.cat([g.flatten() for g in gradients(rule, signals, start, form="recurrent")])
        for form, chunk in FORMS:
            ours = torch.cat([g.flatten() for g in gradients(rule, signals, start, **how(form, chunk))])
            assert distance(ours, want) < 1e-10


@pytest.mark.parametrize("rule", AFFINE, ids=name)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape_any_values(rule, data):
    """Keys neither unit nor orthogonal, rates of exactly 0, 1 and 2, decays from none to total, odd memory layouts."""
    B, H, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 7, 30, 64, 65]))
    K, V = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    if rule.name == "functions_of_signals":
        K = max(K, 3)
    pick = data.draw(st.sampled_from(rule.shapes))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    signals = example(rule, B, T, H, K, V, per_channel=pick == -1, seed=data.draw(st.integers(0, 2**30)))
    for n, s in rule.signals.items():
        x = signals[n]
        if s.role.log_decay:
            values = torch.tensor([0.0, -1e-8, -0.3, -30.0, -1e4, -torch.inf], dtype=x.dtype)
            signals[n] = values[torch.randint(0, 6, x.shape, generator=draw)]
        if s.role.name == "Rate" and "Value" not in {r.role.name for r in rule.signals.values() if rule.name.endswith("oja")}:
            signals[n] = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=x.dtype)[torch.randint(0, 4, x.shape, generator=draw)]
        layout = data.draw(st.sampled_from(["plain", "time last", "expanded"]))
        if layout == "time last":
            signals[n] = signals[n].movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "expanded" and B > 1:
            signals[n] = signals[n][:1].expand(B, *x.shape[1:])
    if rule.name == "exp_gated_hebb":
        signals["g"] = signals["g"].clamp(min=-1e4)
    start = state_for(rule, B, H, K, V)
    want = fw.scan(rule, **signals, state=start, form="recurrent")
    form = data.draw(st.sampled_from(["parallel", "chunk"]))
    size = data.draw(st.integers(1, 64)) if form == "chunk" else None
    out = fw.scan(rule, **signals, state=start, **how(form, size))
    assert off(out, want, start) < 1e-10
    cut = data.draw(st.integers(0, T))
    first = fw.scan(rule, **{n: x[:, :cut] for n, x in signals.items()}, state=start, **how(form, size))
    rest = fw.scan(rule, **{n: x[:, cut:] for n, x in signals.items()}, state=first.state, **how(form, size))
    assert off(Output(torch.cat([first.y, rest.y], 1), rest.state), want, start) < 1e-10


@pytest.mark.parametrize("rule", [R.delta, R.gated_delta, R.generalised_delta, R.oja, R.exp_gated_hebb, R.delta * 2], ids=name)
def test_long_and_prime_lengths(rule):
    for pick in rule.shapes:
        signals, start = example(rule, 1, 257, 1, 8, 3, per_channel=pick == -1), state_for(rule, 1, 1, 8, 3)
        want = fw.scan(rule, **signals, state=start, form="recurrent")
        for form, chunk in [*FORMS, ("chunk", 48)]:
            assert error(fw.scan(rule, **signals, state=start, **how(form, chunk)), want) < 1e-10


@pytest.mark.parametrize("rule", AFFINE, ids=name)
def test_float32_is_as_good_as_the_recurrence(rule):
    """At most twice the error of the float32 recurrence, over three draws."""
    for pick in rule.shapes:
        for form, chunk in [("parallel", None), ("chunk", None), ("chunk", 64)]:
            ours = theirs = lost = 0.0
            for seed in range(3):
                signals, start = example(rule, 2, 130, 2, 16, 12, per_channel=pick == -1, seed=seed), state_for(rule, 2, 2, 16, 12)
                want = fw.scan(rule, **signals, state=start, form="recurrent")
                low, low_start = {n: x.float() for n, x in signals.items()}, tuple(s.float() for s in start)
                theirs += error(fw.scan(rule, **low, state=low_start, form="recurrent"), want)
                ours += error(fw.scan(rule, **low, state=low_start, **how(form, chunk)), want)
                lost += max(TINY * x.numel() ** 0.5 / max(x.norm().item(), TINY) for x in (want.y, *states(want)))
            assert ours <= 2 * theirs + 1e-7 + lost


@pytest.mark.parametrize("rule", NOT_AFFINE, ids=name)
def test_rules_that_are_not_affine_run_recurrent_and_say_why(rule):
    signals = example(rule, 2, 5, 2, 4, 3)
    out = fw.scan(rule, **signals)
    assert out.y.shape == (2, 5, 2, 3)
    assert fw.plan(rule, **signals).form == "recurrent"
    for form in {"parallel", "chunk"} - set(rule.forms):
        with pytest.raises(fw.FormError, match=NOT_AFFINE[rule]) as refused:
            fw.scan(rule, **signals, form=form)
        assert "rows.py:" in str(refused.value)
    assert NOT_AFFINE[rule] in fw.plan(rule, **signals).why


def test_control_flow_that_depends_on_data_runs_row_by_row():
    from rows import hesitant

    signals = example(hesitant, 2, 6, 2, 4, 3)
    whole = fw.scan(hesitant, **signals).y
    single = fw.scan(hesitant, **{n: x[1:, :, :1] for n, x in signals.items()}).y
    assert torch.equal(whole[1:, :, :1], single)


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
def test_derivatives_by_finite_differences(form):
    for rule in (R.gated_delta, R.generalised_delta, R.gated_oja, R.exp_gated_hebb):
        signals = {n: x.requires_grad_() for n, x in example(rule, 1, 5, 1, 3, 2, per_channel=-1 in rule.shapes).items()}
        signals = {n: (x.detach() - 0.01).requires_grad_() if rule.signals[n].role.log_decay else x for n, x in signals.items()}
        start = tuple(s.requires_grad_() for s in state_for(rule, 1, 1, 3, 2))

        def f(*tensors, rule=rule, names=tuple(signals)):
            out = fw.scan(rule, **dict(zip(names, tensors, strict=False)), state=tensors[len(names) :], form=form)
            return (out.y, *states(out))

        assert torch.autograd.gradcheck(f, (*signals.values(), *start))


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
def test_second_derivatives(form):
    for rule in (R.delta, R.decayed_hebb):
        signals = {n: x.requires_grad_() for n, x in example(rule, 1, 3, 1, 2, 2).items()}

        def f(*tensors, rule=rule, names=tuple(signals)):
            return fw.scan(rule, **dict(zip(names, tensors, strict=True)), form=form).y

        assert torch.autograd.gradgradcheck(f, tuple(x.detach().clone().requires_grad_() for x in signals.values()))
