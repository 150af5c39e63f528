"""fla's functional interface: against its own token-by-token references, where fla-core is installed, and against itself."""

import ast
import inspect

import pytest
import torch
from references import operators, reference
from torch.nn import functional as F

import fastweights as fw
from fastweights.compat import fla


def draw(T=37, H=2, K=8, V=5, channel=False, n=1):
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(2, *shape, generator=g)

    return {
        "q": r(T, H, K), "k": F.normalize(r(T * n, H, K), dim=-1), "v": r(T * n, H, V), "beta": r(T * n, H).sigmoid(),
        "g": -F.softplus(r(T, H, K) if channel else r(T, H)), "S": torch.randn(2, H, K, V, generator=g),
    }  # fmt: skip


def close(a, b):
    assert a.shape == b.shape
    assert (a - b).norm() <= 2e-6 * (b.norm() + 1)


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_delta():
    x = draw()
    theirs = reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    none = torch.zeros_like(x["g"])
    found = fla.chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], initial_state=x["S"], output_final_state=True)
    same(found, theirs(x["q"], x["k"], x["v"], x["beta"], none, initial_state=x["S"], output_final_state=True))


def test_gated_delta():
    x = draw()
    theirs = reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"], "g": x["g"], "initial_state": x["S"], "output_final_state": True}
    expected = theirs(**given)
    same(fla.chunk_gated_delta_rule(**given), expected)
    same(fla.fused_recurrent_gated_delta_rule(**given), expected)
    first = fla.chunk_gated_delta_rule(**given | {"initial_state": x["S"].mT, "state_v_first": True})
    same((first[0], first[1].mT), expected)


def test_kda():
    x = draw(channel=True)
    theirs = reference("kda", "naive_recurrent_kda")
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["g"], "beta": x["beta"], "initial_state": x["S"], "output_final_state": True}
    same(fla.chunk_kda(**given), theirs(**given))


def test_gate_in_kernel():
    x = draw(channel=True)
    A_log, bias = torch.randn(2), torch.randn(16)
    raw = torch.randn_like(x["g"])
    made = -A_log.exp()[:, None] * F.softplus(raw + bias.view(2, 8))
    plain = fla.chunk_kda(x["q"], x["k"], x["v"], made, x["beta"])[0]
    inside = fla.chunk_kda(x["q"], x["k"], x["v"], raw, x["beta"], use_gate_in_kernel=True, A_log=A_log, dt_bias=bias)[0]
    close(inside, plain)


def test_gla_and_simple_gla():
    x = draw(channel=True)
    theirs = reference("gla", "naive_recurrent_gla")
    close(fla.chunk_gla(x["q"], x["k"], x["v"], x["g"])[0], theirs(x["q"], x["k"], x["v"], x["g"])[0])
    x = draw()
    theirs = reference("simple_gla", "naive_recurrent_simple_gla")
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["g"], "initial_state": x["S"], "output_final_state": True}
    same(fla.chunk_simple_gla(**given), theirs(**given))


def test_comba_reads_the_undecayed_matrix_as_the_kernels_do():
    x = draw()
    p = torch.randn_like(x["k"]) * 0.3
    found, _ = fla.chunk_comba(x["q"], x["k"], x["v"], p, x["g"], x["beta"])
    S, y = torch.zeros(2, 2, 8, 5), []
    for t in range(x["q"].shape[1]):
        k, v, b = x["k"][:, t], x["v"][:, t], x["beta"][:, t, :, None]
        new = v - torch.einsum("bhkv,bhk->bhv", S, p[:, t])
        S = S * x["g"][:, t].exp()[..., None, None] + k[..., None] * (b * new)[..., None, :]
        y.append(torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t] * 8**-0.5))
    close(found, torch.stack(y, 1))


def test_gdn2():
    x = draw(channel=True)
    b, w = torch.rand_like(x["q"]), torch.rand_like(x["v"])
    theirs = reference("gdn2", "naive_recurrent_gdn2")
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["g"], "b": b, "w": w, "initial_state": x["S"], "output_final_state": True}
    same(fla.chunk_gdn2(**given), theirs(**given))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gated_delta_product(n):
    x = draw(n=n)
    theirs = reference("gated_delta_product", "naive_recurrent_gated_delta_product")
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["g"], "beta": x["beta"], "num_householder": n}
    expected = theirs(**given, scale=8**-0.5, initial_state=x["S"], output_final_state=True)
    same(fla.chunk_gated_delta_product(**given, initial_state=x["S"], output_final_state=True), expected)


def test_rwkv7():
    x = draw(channel=True)
    a = -F.normalize(torch.randn_like(x["k"]), dim=-1)
    b = -a * torch.rand_like(a)
    S, y = x["S"], []
    for t in range(x["q"].shape[1]):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t])
        S = (
            S * x["g"][:, t].exp()[..., None]
            + b[:, t][..., None] * read[..., None, :]
            + x["k"][:, t][..., None] * x["v"][:, t][..., None, :]
        )
        y.append(torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]))
    same(fla.fused_recurrent_rwkv7(x["q"], x["g"], x["k"], x["v"], a, b, 1.0, x["S"]), (torch.stack(y, 1), S))


def test_rwkv6():
    x, u = draw(channel=True), torch.randn(2, 8)
    S, y = torch.zeros(2, 2, 8, 5), []
    for t in range(x["q"].shape[1]):
        kv = x["k"][:, t][..., None] * x["v"][:, t][..., None, :]
        y.append(torch.einsum("bhkv,bhk->bhv", S + u[..., None] * kv, x["q"][:, t] * 8**-0.5))
        S = S * x["g"][:, t].exp()[..., None] + kv
    same(fla.chunk_rwkv6(x["q"], x["k"], x["v"], x["g"], u, output_final_state=True), (torch.stack(y, 1), S))


def test_retention_and_lightning():
    x = draw()
    theirs = reference("retention", "naive_retention")
    head_first = [x[n].transpose(1, 2) for n in ("q", "k", "v")]
    close(fla.chunk_retention(x["q"], x["k"], x["v"])[0], theirs(*head_first).transpose(1, 2))
    g = (-4 * (1 - 3 / 8) * torch.arange(2.0)).expand(2, 37, 2)
    close(fla.chunk_lightning_attn(x["q"], x["k"], x["v"], 3, 8)[0], fla.chunk_simple_gla(x["q"], x["k"], x["v"], g)[0])


def test_linear_attention_with_its_sum_of_keys():
    x = draw()
    q, k = x["q"].exp(), x["k"].exp()
    whole, state = fla.chunk_linear_attn(q, k, x["v"], output_final_state=True)
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril()
    close(whole, torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), x["v"]))
    first, half = fla.chunk_linear_attn(q[:, :20], k[:, :20], x["v"][:, :20], output_final_state=True)
    second, end = fla.chunk_linear_attn(q[:, 20:], k[:, 20:], x["v"][:, 20:], initial_state=half, output_final_state=True)
    close(torch.cat([first, second], 1), whole)
    same(end, state)


@pytest.mark.parametrize("keep", [False, True])
def test_packed_sequences_are_sequences(keep):
    x = {n: t[:1] for n, t in draw().items()}
    ends = torch.tensor([0, 5, 5, 30, 37])
    states = torch.randn(4, 2, 8, 5) if keep else None
    given = ("q", "k", "v", "g", "beta")
    y, S = fla.chunk_gated_delta_rule(*(x[n] for n in given), cu_seqlens=ends, initial_state=states, output_final_state=keep)
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        one = fla.chunk_gated_delta_rule(
            *(x[n][:, a:b] for n in given), initial_state=None if states is None else states[i : i + 1], output_final_state=True
        )
        close(y[:, a:b], one[0])
        if keep:
            close(S[i : i + 1], one[1])


def test_reversed_time():
    x = draw(channel=True)
    back = fla.fused_recurrent_gla(*(x[n].flip(1) for n in ("q", "k", "v", "g")))[0].flip(1)
    close(fla.fused_recurrent_gla(x["q"], x["k"], x["v"], x["g"], reverse=True)[0], back)


def test_bfloat16_and_gradients():
    x = draw()
    leaves = {n: t.bfloat16().requires_grad_() for n, t in x.items() if n not in ("S", "g")} | {"g": x["g"].requires_grad_()}
    y, S = fla.chunk_gated_delta_rule(**leaves, use_qk_l2norm_in_kernel=True, output_final_state=True)
    assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in leaves.values())


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_scale_that_is_a_tensor_has_a_gradient(l2norm, scale):
    x = {n: t for n, t in draw().items() if n != "S"}
    given = torch.tensor(scale, requires_grad=True)
    y = fla.chunk_gated_delta_rule(**x, scale=given, use_qk_l2norm_in_kernel=l2norm)[0]
    close(y, fla.chunk_gated_delta_rule(**x, scale=scale, use_qk_l2norm_in_kernel=l2norm)[0])
    assert torch.allclose(torch.autograd.grad(y.sum(), given)[0], y.sum().detach() / scale, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fla.fused_recurrent_gla(x["q"], x["k"], x["v"], gv=x["v"]), "gv"),
        (lambda x: fla.chunk_kda(x["q"], x["k"], x["v"], x["q"], x["beta"], cp_context=object()), "cp_context"),
        (lambda x: fla.chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], cu_seqlens=torch.tensor([0, 37])), "batch size is 2"),
        (lambda x: fla.chunk_delta_rule(*(x[n][:1] for n in ("q", "k", "v", "beta")), cu_seqlens=[0, 40]), "from 0 to T = 37"),
        (lambda x: fla.chunk_gated_delta_product(x["q"], x["k"], x["v"], x["g"], x["beta"], 2), "num_householder"),
        (lambda x: fla.chunk_kda(x["q"], x["k"], x["v"], x["q"], x["beta"], use_gate_in_kernel=True), "A_log"),
        (lambda x: fla.chunk_gla(x["q"], x["k"], x["v"], x["q"], g_gamma=torch.ones(2)), "g_gamma"),
        (lambda x: fla.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], allow_neg_eigval=True), "set both"),
    ],
)
def test_what_is_not_served_is_named(call, said):
    with pytest.raises(fw.SignalError, match=said):
        call(draw())


def theirs():
    """The order of arguments of every function of fla.ops, read from its source."""
    root = operators()
    if root is None:
        return {}
    found = {}
    for path in sorted(root.glob("*/*.py")) + sorted(root.glob("*/dplr/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and hasattr(fla, node.name) and not any(a.arg == "self" for a in node.args.args):
                found[node.name] = [a.arg for a in node.args.args]
    return {n: order for n, order in found.items() if order}


@pytest.mark.parametrize("name", theirs())
def test_arguments_come_in_their_order(name):
    mine = [p.name for p in inspect.signature(getattr(fla, name)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    order = theirs()[name]
    assert mine == order[: len(mine)]
    assert getattr(fla, name).__name__ == name


@pytest.mark.parametrize("keep", [False, True])
def test_packed_sequences_backwards(keep):
    x = {n: t[:1] for n, t in draw(channel=True).items()}
    ends, states = torch.tensor([0, 5, 5, 37]), torch.randn(3, 2, 8, 5) if keep else None
    given = [x[n] for n in ("q", "k", "v", "g")]
    y, S = fla.fused_recurrent_gla(*given, initial_state=states, output_final_state=True, reverse=True, cu_seqlens=ends)
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        part, first = [t[:, a:b] for t in given], None if states is None else states[i : i + 1]
        one = fla.fused_recurrent_gla(*part, initial_state=first, output_final_state=True, reverse=True)
        close(y[:, a:b], one[0])
        close(S[i : i + 1], one[1])


def test_normalised_linear_attention_with_shared_keys():
    x = draw(H=4)
    q, k = x["q"][:, :, :2].exp(), x["k"][:, :, :2].exp()
    wide = [t.repeat_interleave(2, 2) for t in (q, k)]
    close(fla.chunk_linear_attn(q, k, x["v"])[0], fla.chunk_linear_attn(*wide, x["v"])[0])
