"""Rules as people write them: each must be the same function in every form, or be refused with its reason."""

import numpy as np
import pytest
import torch
from rows import R
from torch.nn import functional as F

import fastweights as fw
from fastweights import Gate, Key, KeyState, KeyVector, PositiveKey, Query, Rate, ScalarState, Value, outer
from fastweights.engine.check import distance, example, gradients

A_MATRIX = torch.arange(16.0, dtype=torch.float64).reshape(4, 4).sin()


def keywords(W, k: Key, v: Value, k2: Key):
    return W + torch.add(outer(v, k), torch.outer(input=v, vec2=k2), alpha=0.5)


def keyword_bound(W, k: Key, v: Value, beta: Rate):
    return W + outer(v, torch.clamp(k, min=beta))


def comparison(W, k: Key, v: Value, beta: Rate):
    return W * (beta != 0) + outer(v, k * (k == k.max()))


def logic(W, k: Key, v: Value):
    return W + outer(v, torch.where((k > 0) & ~(k > 0.4), k, 0.5 * k))


def trace_with_alpha(W, z: KeyState, k: Key, v: Value):
    z = torch.add(0.5 * z, k, alpha=0.3)
    return W + outer(v, z), z


def trace_of_a_number(W, z: KeyState, k: Key, v: Value, beta: Rate):
    z = z + beta
    return W + outer(v, z), z


def running_maximum(W, m: ScalarState, k: Key, v: Value, i: Gate):
    m = torch.max(m - 0.1, i)
    return W + outer(v, m * k), m


def like_ones(W, k: Key, v: Value):
    return W * (torch.ones_like(k) * 0.1) + outer(v, k.to(v.dtype))


def numpy_numbers(W, k: Key, v: Value):
    return np.exp(-1 / 20) * W + outer(v, np.float32(0.5) * k / np.sqrt(3))


def sum_of_outers(W, k: Key, v: Value):
    return W + sum(outer(v / (i + 1), k) for i in range(3))


def accumulated(W, k: Key, v: Value):
    dW = torch.zeros_like(W)
    dW = dW + outer(v - W @ k, k)
    return W.clone() + dW


def columns(W, k: Key, v: Value, beta: Rate):
    return W + beta * (v[:, None] - W @ k[:, None]) @ k[None, :]


def reshaped(W, k: Key, v: Value, beta: Rate):
    return W + beta * (v - W @ k).reshape(-1, 1) @ k.view(1, -1)


def blas_names(W, k: Key, v: Value, beta: Rate):
    return torch.lerp(torch.addr(W, v, k), outer(v, k), beta)


def closes_over_a_matrix(W, k: Key, v: Value):
    return W + outer(v, A_MATRIX @ k)


def stacked_reads(W, q: Query, k: Key, v: Value):
    new = W + outer(v, k)
    return new, torch.stack([new @ q, W @ k]).mean(0) + torch.clamp(new @ q, min=W @ k)


def constant_output(W, k: Key, v: Value):
    return W + outer(v, k), torch.zeros(v.shape, dtype=v.dtype)


def stops_gradients(W, k: Key, v: Value):
    with torch.no_grad():
        n = k.norm()
    return W + outer(v, k / n)


def best_key(W, k: Key, v: Value):
    return W + outer(v, k * torch.topk(k, 2).values.sum())


WRITINGS = [
    keywords, keyword_bound, comparison, logic, trace_with_alpha, trace_of_a_number, running_maximum, like_ones, numpy_numbers,
    sum_of_outers, accumulated, columns, reshaped, blas_names, closes_over_a_matrix, stacked_reads, constant_output,
    stops_gradients, best_key,
]  # fmt: skip


@pytest.mark.parametrize("body", WRITINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", [(2, 9, 2, 4, 3), (3, 3, 3, 4, 4), (2, 5, 1, 4, 1)])
def test_every_form_computes_what_was_written(body, sizes):
    rule = fw.rule(body)
    assert len(rule.forms) == 3, rule.explain()
    signals = example(rule, *sizes)
    if "beta" in signals:
        signals["beta"][:, ::2] = 0
    B, _, H, K, V = sizes
    start = tuple(0.3 * torch.ones(B, H, *s.shapes(K, V)[0], dtype=torch.float64) for s in rule.states.values())
    want = fw.scan(rule, **signals, state=start, form="recurrent")
    want_gradient = torch.cat([g.flatten() for g in gradients(rule, signals, start, form="recurrent")])
    for form in ("parallel", "chunk"):
        out = fw.scan(rule, **signals, state=start, form=form)
        assert distance(out.y, want.y) < 1e-12
        gradient = torch.cat([g.flatten() for g in gradients(rule, signals, start, form=form)])
        assert distance(gradient, want_gradient) < 1e-10


def test_delta_in_columns_is_delta():
    assert fw.rule(columns) == fw.rule(reshaped) == R.delta


@pytest.mark.parametrize(
    "loss",
    [
        lambda W, k, v: torch.sub(v, W @ k, alpha=2).square().sum(),
        lambda W, k, v: (v + (W @ k).sum()).square().sum(),
        lambda W, k, v: (torch.ones(3, dtype=v.dtype) * (W @ k).sum() * v.sum()).sum(),
        lambda W, k, v: (W * v[:, None]).sum(),
        lambda W, k, v: ((v - W @ k) ** 2).sum(-1).mean(),
    ],
)
def test_symbolic_gradients_are_torch_gradients(loss):
    rule = fw.descend(loss)
    signals = example(rule, 1, 6, 1, 4, 3)
    want = fw.scan(rule, **signals, form="recurrent").y
    if len(rule.forms) == 3:
        assert distance(fw.scan(rule, **signals, form="chunk").y, want) < 1e-12


def test_tensors_of_the_surroundings_are_read_anew_and_trained():
    p = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    @fw.rule
    def gated(W, k: Key, v: Value):
        return torch.sigmoid(p) * W + outer(v, k)

    signals = example(gated, 1, 6, 1, 4, 3)
    for value in (0.0, 3.0):
        with torch.no_grad():
            p.fill_(value)
        found = []
        for form in ("recurrent", "chunk"):
            p.grad = None
            y = fw.scan(gated, **signals, form=form).y
            y.sum().backward()
            found.append((y.detach(), p.grad))
        assert distance(found[1][0], found[0][0]) < 1e-12
        assert distance(found[1][1], found[0][1]) < 1e-12


def test_branches_on_equality_are_found_out():
    @fw.rule
    def skips(W, k: Key, v: Value, beta: Rate):
        if beta == 0:
            return W
        return W + outer(v, k)

    assert skips.forms == ("recurrent",)
    signals = example(skips, 1, 4, 1, 4, 3)
    signals["beta"][0, 1] = 0
    assert distance(fw.scan(skips, **signals).state, fw.scan(R.hebb, **{n: signals[n][:, [0, 2, 3]] for n in "qkv"}).state) < 1e-12


def test_questions_about_values_run_recurrent():
    @fw.rule
    def asks(W, k: Key, v: Value):
        return W if torch.allclose(k, k.abs()) else W + outer(v, k)

    assert asks.forms == ("recurrent",)
    assert fw.scan(asks, **example(asks, 1, 4, 1, 4, 3)).y.isfinite().all()


REFUSED = {
    "Lin times Mat": (lambda: fw.rule(lambda_read_times_matrix).program, "mixes rows and columns"),
    "a dense matrix": (lambda: fw.rule(lambda_dense).program, "no normal form"),
    "a delay line": (lambda: fw.rule(lambda_delay).program, "the state z is not"),
    "noise": (lambda: fw.rule(lambda_noise).program, "draws at random"),
    "a number as W": (lambda: fw.rule(lambda_number).program, "returns a float as W"),
    "a state as query": (lambda: fw.rule(lambda_query_state).signals, "q is the query"),
    "an option's name": (lambda: fw.rule(lambda_reserved), "form is an option of scan"),
    "one name, two things": (lambda: fw.rule(trace_with_alpha) >> fw.rule(lambda_z), "rename it"),
}


def lambda_read_times_matrix(W, k: Key, v: Value):
    return W + (W @ k)[:, None] * outer(v, k) * (W @ k)[:, None]


def lambda_dense(W, k: Key, v: Value):
    return W @ A_MATRIX.float() + outer(v, k)


def lambda_delay(W, z: KeyState, k: Key, v: Value):
    z = torch.cat([k[:1], z[:-1]])
    return W + outer(v, z), z


def lambda_noise(W, k: Key, v: Value):
    return W + outer(v, F.dropout(k, 0.5))


def lambda_number(W, k: Key, v: Value):
    return 0.5


def lambda_query_state(W, q: KeyState, k: Key, v: Value):
    return W + outer(v, q), k


def lambda_reserved(W, k: Key, form: Value):
    return W + outer(form, k)


def lambda_z(W, z: KeyVector, k: Key):
    return W - outer(W @ z, k)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_reason(case):
    call, message = REFUSED[case]
    with pytest.raises(fw.FastWeightError) as refused:
        call()
    assert message in str(refused.value)


def test_equality_is_not_fooled():
    @fw.rule
    def root(W, k: PositiveKey, v: Value):
        return W + outer(v, k.sqrt())

    @fw.rule
    def other(W, k: PositiveKey, v: Value):
        return W - 5 * outer(v, k.sqrt())

    @fw.rule
    def huge(W, k: Key, v: Value):
        return W + outer(v, (k**4).exp())

    @fw.rule
    def huger(W, k: Key, v: Value):
        return W + outer(v, (k**4).exp() * (1 + 0 * k) + 0)

    @fw.rule
    def hardly_bounded(W, k: Key, v: Value, beta: Rate):
        return W + outer(beta * torch.clamp(v - W @ k, -1e4, 1e4), k)

    @fw.rule
    def short(W, k: Key, v: Value):
        return W + outer(v, torch.cat([k[:4], 0 * k[4:]]))

    assert root != other
    assert huge == huge.T.T or huge.fingerprint["values"]
    assert huge != huger
    assert hardly_bounded != R.delta
    assert short != R.hebb


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
def test_a_nan_in_a_query_is_only_read_once_and_one_in_a_value_stays_in_its_row(form):
    signals = example(R.delta, 1, 9, 1, 4, 3)
    signals["q"][0, 2] = float("nan")
    out = fw.scan(R.delta, **signals, form=form)
    assert out.y.isnan().any(-1).flatten().tolist() == [t == 2 for t in range(9)]
    assert out.state.isfinite().all()
    signals = example(R.delta, 1, 9, 1, 4, 3)
    signals["v"][0, 4, 0, 1] = float("nan")
    out = fw.scan(R.delta, **signals, form=form)
    assert out.state.isnan().any(-1).flatten().tolist() == [False, True, False]
    assert out.y[..., 0].isfinite().all()


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
@pytest.mark.parametrize("body", [trace_with_alpha, running_maximum], ids=lambda f: f.__name__)
def test_a_reset_cures_a_carried_state(form, body):
    rule = fw.rule(body)
    signals = example(rule, 1, 9, 1, 4, 3)
    signals["k" if "k" in signals and body is trace_with_alpha else "i"][0, 2] = float("nan")
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 6] = True
    out = fw.scan(rule, **signals, reset=reset, form=form)
    assert out.y[0, 2:6].isnan().any(-1).all()
    assert out.y[0, 6:].isfinite().all()
    assert all(s.isfinite().all() for s in out.state)


def test_the_attention_matrix_of_what_is_not_linear_in_v_is_refused():
    @fw.rule
    def squared(W, k: Key, v: Value):
        return W + outer(v / (1 + v @ v), k)

    signals = example(squared, 1, 6, 1, 4, 3)
    with pytest.raises(fw.FormError, match="not linear in v"):
        fw.attention_matrix(squared, q=signals["q"], k=signals["k"])


def test_scan_under_vmap_and_inference_mode_and_a_meta_default_device():
    signals = example(R.gated_delta, 2, 7, 1, 4, 3)
    want = fw.scan(R.gated_delta, **signals).y
    mapped = torch.vmap(lambda k, g: fw.scan(R.gated_delta, **{**signals, "k": k, "g": g}, form="chunk").y)
    twice = mapped(torch.stack([signals["k"]] * 2), torch.stack([signals["g"]] * 2))
    assert distance(twice[1], want) < 1e-12
    rule = fw.rule(like_ones)
    with torch.inference_mode():
        fw.scan(rule, **example(rule, 1, 4, 1, 4, 3))
    signals = {n: x.requires_grad_() for n, x in example(rule, 1, 4, 1, 4, 3).items()}
    fw.scan(rule, **signals).y.sum().backward()
    with torch.device("meta"):
        assert fw.rule(like_ones).program.n == 1
