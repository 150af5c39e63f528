"""What the fla backend hands to flash-linear-attention, with token-by-token loops of the documented equations in the place of its kernels.

The loops are themselves held against the references in plain torch that its package has. Its kernels run on GPUs only.
"""

import pytest
import torch
from references import reference
from rows import AFFINE, R, name, state_for

import fastweights as fw
from fastweights.engine import fla
from fastweights.engine.check import example

SERVED = {
    "hebb": "chunk_linear_attn", "decayed_hebb": "chunk_simple_gla", "delta": "chunk_delta_rule", "gated_delta": "chunk_gated_delta_rule",
    "implicit_delta": "chunk_delta_rule", "normalised_hebb": "chunk_linear_attn", "exp_gated_hebb": "chunk_simple_gla",
    "generalised_delta": "chunk_dplr_delta_rule", "comba": "chunk_dplr_delta_rule",
    "erase_write": "chunk_dplr_delta_rule",
}  # fmt: skip


def sequence(S, tokens):
    """Reads and last state of one sequence and head; ``tokens`` are dictionaries of vectors and numbers."""
    out = []
    for t in tokens:
        log = t.get("g", t.get("gk", torch.zeros(())))
        a = torch.exp(log)
        decayed = (a[:, None] if a.ndim else a) * S
        if "beta" in t:
            S = decayed + t["beta"] * torch.outer(t["k"], t["v"] - decayed.T @ t["k"])
        elif "a" in t:
            S = decayed + torch.outer(t["b"], S.T @ t["a"]) + torch.outer(t["k"], t["v"])
        else:
            S = decayed + torch.outer(t["k"], t["v"])
        out.append(S.T @ t["q"])
    return torch.stack(out), S


def loop(*, scale, initial_state, output_final_state, cu_seqlens=None, normalize=False, **named):
    assert output_final_state
    assert not normalize
    assert initial_state.dtype == torch.float32
    B, T, H = named["q"].shape[:3]
    pieces = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        assert B == 1
        pieces = [(0, i, j) for i, j in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    assert all(x.isfinite().all() for x in named.values())  # the kernels take differences of sums of decays
    named = {n: x.float() * (scale if n == "q" else 1) for n, x in named.items()}
    rows, states = {}, []
    for n, (b, i, j) in enumerate(pieces):
        heads = [sequence(initial_state[n, h], [{m: x[b, t, h] for m, x in named.items()} for t in range(i, j)]) for h in range(H)]
        rows.setdefault(b, []).append(torch.stack([y for y, _ in heads], 1))
        states.append(torch.stack([S for _, S in heads]))
    return torch.stack([torch.cat(rows[b]) for b in range(B)]), torch.stack(states)


@pytest.fixture
def asked(monkeypatch):
    """The kernels that were asked for, while loops stand in for them."""
    seen = []
    monkeypatch.setattr(fla, "unavailable", lambda device: "")
    monkeypatch.setattr(fla, "_SIXTEEN_BITS", ())
    monkeypatch.setattr(fla, "kernel", lambda found: seen.append(found.function) or loop)
    return seen


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("rule", [*AFFINE, R.delta * 2, R.gated_delta * 3], ids=name)
def test_every_program_that_has_a_kernel(asked, rule, resets):
    B, T, H, K, V = 2, 11, 2, 4, 3
    why = fla.arguments(rule.program)
    signals = {n: x.float() for n, x in example(rule, B, T, H, K, V).items()}
    state = tuple(s.float() for s in state_for(rule, B, H, K, V))
    state = state if len(state) > 1 else state[0]
    reset = torch.zeros(B, T, dtype=torch.bool) if resets else None
    if resets:
        reset[0, [0, 3, 4]] = reset[1, 10] = True
    if isinstance(why, str):
        with pytest.raises(fw.FormError, match="backend 'fla' is refused"):
            fw.scan(rule, **signals, state=state, backend="fla")
        return
    ours = fw.scan(rule, **signals, state=state, reset=reset, backend="torch")
    theirs = fw.scan(rule, **signals, state=state, reset=reset, backend="fla")
    assert len(asked) == 1
    assert torch.allclose(ours.y, theirs.y, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (ours.state, theirs.state)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_which_kernel(asked):
    for rule, function in SERVED.items():
        signals = {n: x.float() for n, x in example(R.get(rule), 1, 3, 1, 4, 4).items()}
        assert function in fw.plan(R.get(rule), **signals, backend="fla").why, rule
    k = torch.ones(1, 3, 1, 4)
    assert "chunk_kda" in fw.plan(R.gated_delta, q=k, k=k, v=k, beta=k[..., 0], g=-k, backend="fla").why
    assert "chunk_gla" in fw.plan(R.decayed_hebb, q=k, k=k, v=k, g=-k, backend="fla").why


def test_gradients_and_few_heads(asked):
    signals = {n: x.float() for n, x in example(R.gated_delta, 1, 7, 4, 4, 3).items()}
    signals = {n: (x[:, :, :2] if n in "qk" else x).requires_grad_() for n, x in signals.items()}
    signals = {n: x.detach().requires_grad_() for n, x in signals.items()}
    found = [torch.autograd.grad(fw.scan(R.gated_delta, **signals, backend=b).y.sin().sum(), signals.values()) for b in ("torch", "fla")]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_sixteen_bits_and_float32_gates(asked):
    signals = {n: x.bfloat16() for n, x in example(R.gated_delta, 1, 7, 2, 4, 3).items()}
    signals["g"] = signals["g"].float()
    y, W = fw.scan(R.gated_delta, **signals, backend="fla")
    expected = fw.scan(R.gated_delta, **signals, backend="torch")
    assert (y.dtype, W.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(W, expected.state, rtol=1e-4, atol=1e-4)


def test_what_is_refused_says_why():
    signals = {n: x.float() for n, x in example(R.gated_delta, 1, 3, 1, 4, 4).items()}
    with pytest.raises(fw.FormError, match="fla needs a GPU, and the signals are on cpu; leave backend='auto'"):
        fw.scan(R.gated_delta, **signals, backend="fla")
    with pytest.raises(fw.FormError, match="chunks of its own"):
        fw.scan(R.gated_delta, **signals, backend="fla", chunk_size=8)
    with pytest.raises(fw.FormError, match="of a read of W"):
        fw.scan(R.softmax_delta, **{n: x.float() for n, x in example(R.softmax_delta, 1, 3, 1, 4, 4).items()}, backend="fla")


@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta, R.generalised_delta], ids=name)
def test_forgetting_everything(asked, rule):
    signals = {n: x.float() for n, x in example(rule, 1, 7, 2, 4, 3).items()}
    signals["g"][:, 3] = -torch.inf
    ours, theirs = (fw.scan(rule, **signals, backend=b) for b in ("torch", "fla"))
    assert torch.allclose(ours.y, theirs.y, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.state, theirs.state, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_refused_before(asked):
    k = torch.zeros(1, 3, 1, 512)
    with pytest.raises(fw.FormError, match="keys of up to 256 numbers, and these have 512"):
        fw.plan(R.gated_delta, q=k, k=k, v=k, beta=k[..., 0], g=k[..., 0], backend="fla")
    odd = torch.zeros(1, 3, 1, 5, dtype=torch.bfloat16)
    with pytest.raises(fw.FormError, match="even K and V in 16 bits, and these are 5 and 5"):
        fw.plan(R.hebb, q=odd, k=odd, v=odd, backend="fla")
    x = torch.zeros(2, 1, 3, 1, 4)
    with pytest.raises(fw.FormError, match="run outside of"):
        torch.vmap(lambda k: fw.scan(R.hebb, q=k, k=k, v=k, backend="fla").y)(x)


def test_float32_where_a_kernel_refuses_it(monkeypatch):
    monkeypatch.setattr(fla, "unavailable", lambda device: "")
    with pytest.raises(fw.FormError, match="chunk_delta_rule does not take"):
        fw.plan(R.delta, **{n: x.float() for n, x in example(R.delta, 1, 3, 1, 4, 4).items()}, backend="fla")


def test_the_loops_are_what_fla_computes():
    draw = torch.Generator().manual_seed(0)
    q, k, v, a, b = (torch.randn(2, 9, 2, n, generator=draw) for n in (4, 4, 3, 4, 4))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, gk, beta = (-torch.rand(2, 9, 2, *n, generator=draw) for n in ((), (4,), ()))
    first = torch.randn(2, 2, 4, 3, generator=draw)
    rest = {"initial_state": first, "output_final_state": True}
    by_heads = [x.transpose(1, 2) for x in (q, k, v, a, b, gk)]
    y, S = reference("generalized_delta_rule/dplr", "dplr_recurrence")(*by_heads, **rest)
    for theirs, mine in (
        (reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")(q, k, v, -beta, g, scale=1.0, **rest), {"g": g, "beta": -beta}),
        (reference("kda", "naive_recurrent_kda")(q, k, v, gk, -beta, scale=1.0, **rest), {"g": gk, "beta": -beta}),
        (reference("simple_gla", "naive_recurrent_simple_gla")(q, k, v, g, scale=1.0, **rest), {"g": g}),
        ((2 * y.transpose(1, 2), S), {"a": a, "b": b, "gk": gk}),
    ):
        ours = loop(q=q, k=k, v=v, scale=1.0, **rest, **mine)
        assert torch.allclose(ours[0], theirs[0].float(), rtol=1e-4, atol=1e-5)
        assert torch.allclose(ours[1], theirs[1].float(), rtol=1e-4, atol=1e-5)
