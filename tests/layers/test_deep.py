"""Deep fast networks: descent token by token as the papers write it, its limits, streaming, documents, gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastweights as fw
from fastweights.layers.deep import DeepLayer, Normalised, half_squared_error, mlp, squared_error
from fastweights.layers.descent import LINEAR, deep_scan

B, T, H, K, V = 2, 11, 2, 4, 4


class Cubic(nn.Module):
    """Not made of linear maps alone: a weight is also multiplied with itself, out of sight in a list."""

    def __init__(self):
        super().__init__()
        self.A, self.scale = nn.Parameter(torch.zeros(V, K)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.scale * torch.tanh(F.linear(x, self.A) + torch.stack([self.A, self.A]).prod(0) @ x)


class Shared(nn.Module):
    """One linear map, used twice, and a bias that is added to a fixed map."""

    def __init__(self):
        super().__init__()
        self.map, self.still, self.bias = nn.Linear(K, K), nn.Parameter(torch.zeros(V, K)), nn.Parameter(torch.zeros(V))

    def forward(self, x):
        return F.linear(torch.tanh(self.map(torch.tanh(self.map(x)))), self.still, bias=self.bias)


NETWORKS = {
    "linear": nn.Linear(K, V), "matrix": nn.Linear(K, V, bias=False), "mlp": mlp(K, V, 2),
    "normalised": Normalised(mlp(K, V, 2), V), "cubic": Cubic(), "shared": Shared(),
}  # fmt: skip
FIXED = {"normalised": ("norm.weight", "norm.bias"), "shared": ("still",)}


def by_hand(name, p, x):
    """The same networks, written again."""
    if name in ("linear", "matrix"):
        return p["weight"] @ x + p.get("bias", 0)
    if name == "mlp":
        z = p["0.weight"] @ x + p["0.bias"]
        return p["2.weight"] @ (z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))) + p["2.bias"]
    if name == "normalised":
        z = by_hand("mlp", {n.removeprefix("network."): w for n, w in p.items()}, x)
        z = z - z.mean()
        return x + p["norm.weight"] * z / (z.square().mean() + 1e-5).sqrt() + p["norm.bias"]
    if name == "cubic":
        return p["scale"] * torch.tanh(p["A"] @ x + p["A"] ** 2 @ x)
    once = torch.tanh(p["map.weight"] @ x + p["map.bias"])
    return p["still"] @ torch.tanh(p["map.weight"] @ once + p["map.bias"]) + p["bias"]


def weights(name, seed=0, heads=H):
    random = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(heads, *p.shape, dtype=torch.float64, generator=random) / 2 for n, p in NETWORKS[name].named_parameters()}
    fixed = FIXED.get(name, ())
    return {"params": {n: w for n, w in made.items() if n not in fixed}, "fixed": {n: made[n] for n in fixed}}


def signals(momentum=True, forget=True, tokens=T, seed=0, batch=B, heads=H, dk=K, dv=V):
    random = torch.Generator().manual_seed(seed)

    def draw(kind, *shape):
        return kind(batch, tokens, heads, *shape, dtype=torch.float64, generator=random)

    made = {"q": draw(torch.randn, dk), "k": draw(torch.randn, dk), "v": draw(torch.randn, dv), "beta": 0.05 * draw(torch.rand)}
    made |= {"momentum": draw(torch.rand)} if momentum else {}
    return made | ({"g": -draw(torch.rand)} if forget else {})


def run(name, every=3, form="auto", loss=half_squared_error, given=None, state=None, reset=None, **options):
    return deep_scan(
        NETWORKS[name], loss, every=every, form=form, state=state, reset=reset, **weights(name), **(given or signals(**options))
    )


def loop(name, every, given):
    """One token after the other, the gradient of each at the weights of the beginning of its mini-batch."""
    made = weights(name)
    batch, tokens, heads = given["beta"].shape
    y = torch.zeros(batch, tokens, heads, V, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            slow = {n: w[h] for n, w in made["fixed"].items()}
            W = {n: w[h].clone().requires_grad_() for n, w in made["params"].items()}
            S = {n: torch.zeros_like(w) for n, w in W.items()}
            for t in range(tokens):
                if t % every == 0:
                    start = {n: w.detach().requires_grad_() for n, w in W.items()}
                q, k, v, beta = (given[n][b, t, h] for n in ("q", "k", "v", "beta"))
                surprise = 0.5 * ((by_hand(name, start | slow, k) - v) ** 2).sum()
                slopes = dict(zip(start, torch.autograd.grad(surprise, list(start.values())), strict=True))
                with torch.no_grad():
                    eta = given["momentum"][b, t, h] if "momentum" in given else 0.0
                    keep = given["g"][b, t, h].exp() if "g" in given else 1.0
                    S = {n: eta * S[n] - beta * slopes[n] for n in S}
                    W = {n: keep * W[n] + S[n] for n in W}
                    y[b, t, h] = by_hand(name, W | slow, q)
    return y


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def same(a, b):
    assert a.keys() == b.keys()
    for n in a:
        assert close(a[n].double(), b[n].double()), n


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("options", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_plain_loop(name, options, every):
    given = signals(*options)
    want = loop(name, every, given)
    assert close(run(name, every, "direct", given=given).y, want)
    assert close(run(name, every, given=given).y, want)
    if name == "cubic":
        with pytest.raises(fw.FormError, match="A is given to stack"):
            run(name, every, "dual", given=given)
    else:
        assert close(run(name, every, "dual", given=given).y, want)


@pytest.mark.parametrize("name", ["linear", "normalised", "shared"])
def test_the_forms_have_one_gradient(name):
    found = []
    for form in ("dual", "direct"):
        made = {kind: {n: w.requires_grad_() for n, w in named.items()} for kind, named in weights(name).items()}
        given = {n: x.requires_grad_() for n, x in signals().items()}
        y, state = deep_scan(NETWORKS[name], half_squared_error, every=4, form=form, **made, **given)
        total = y.square().sum() + sum(s.sin().sum() for n, s in state.items() if n != "count")
        found.append(torch.autograd.grad(total, [*given.values(), *made["params"].values(), *made["fixed"].values()]))
    assert all(close(a, b) for a, b in zip(*found, strict=True))
    assert all(a.abs().max() > 0 for a in found[0])


@pytest.mark.parametrize("form", ["dual", "direct"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_matrix_without_mini_batches_is_the_delta_rule(tokens, form):
    given = signals(False, False, tokens)
    y, state = run("matrix", 1, form, given=given)
    W0 = weights("matrix")["params"]["weight"].expand(B, -1, -1, -1).contiguous()
    want, W = fw.scan(fw.rules.delta, state=W0, **given)
    assert close(y, want)
    assert state.keys() == {"W.weight"}
    assert close(state["W.weight"], W)


@pytest.mark.parametrize("options", LINEAR, ids=str)
def test_a_matrix_is_its_linear_rule(options):
    given = signals(*options)
    y, state = run("matrix", 1, given=given)
    W0 = weights("matrix")["params"]["weight"].expand(B, -1, -1, -1).contiguous()
    want, after = fw.scan(LINEAR[options], state=(W0, torch.zeros_like(W0)) if options[0] else W0, **given)
    assert close(y, want)
    assert close(state["W.weight"], after[0] if options[0] else after)


def test_a_matrix_with_momentum_is_the_affine_recurrence():
    given = signals()
    k, v, eta, mu, a = (given[n].numpy() for n in ("k", "v", "beta", "momentum", "g"))
    _, state = run("matrix", 1, given=given)
    for b in range(B):
        for h in range(H):
            W = weights("matrix")["params"]["weight"][h].numpy()
            M = 0 * W
            for t in range(T):
                at = b, t, h
                M = mu[at] * M + eta[at] * (W @ k[at] - v[at])[:, None] * k[at][None, :]
                W = torch.tensor(a[at]).exp().item() * W - M
            assert close(state["W.weight"][b, h], torch.from_numpy(W))
            assert close(state["S.weight"][b, h], torch.from_numpy(-M))


def test_titans_without_momentum_and_forgetting_is_ttt_without_norm():
    given = signals(False, False)
    want = run("mlp", given=given).y
    none = torch.zeros(B, T, H, dtype=torch.float64)
    halved = given | {"beta": given["beta"] / 2}
    assert close(run("mlp", given=halved | {"momentum": none, "g": none}, loss=squared_error).y, want)
    torch.manual_seed(0)
    ttt = DeepLayer(mlp, 8, heads=2, every=4, rate=0.1, loss=half_squared_error).double()
    torch.manual_seed(0)
    titans = DeepLayer(mlp, 8, heads=2, every=4, rate=0.05, loss=squared_error).double()
    x = torch.randn(2, T, 8, dtype=torch.float64)
    assert close(titans(x)[0], ttt(x)[0])


def test_any_loss_makes_the_rule_that_descends_it():
    def huber(W, k, v):
        return F.huber_loss(W @ k, v, reduction="sum", delta=0.5)

    given = signals(False, False)
    y, _ = run("matrix", 1, given=given, loss=lambda y, v: F.huber_loss(y, v, reduction="sum", delta=0.5))
    W0 = weights("matrix")["params"]["weight"].expand(B, -1, -1, -1).contiguous()
    assert close(y, fw.scan(fw.descend(huber), state=W0, **given).y)


def test_a_network_holds_more_pairs_than_a_matrix_of_its_width_can():
    random = torch.Generator().manual_seed(0)
    pairs, passes, d = 24, 600, 6
    k = F.normalize(torch.randn(pairs, d, dtype=torch.float64, generator=random), dim=-1)
    v = F.normalize(torch.randn(pairs, d, dtype=torch.float64, generator=random), dim=-1)
    with_bias = torch.cat([k, torch.ones(pairs, 1, dtype=torch.float64)], 1)
    least = (with_bias @ torch.linalg.lstsq(with_bias, v).solution - v).square().mean()  # no matrix does better

    def error(make, rate):
        torch.manual_seed(0)
        network = make(d, d).double()
        params = {n: p.detach()[None] for n, p in network.named_parameters()}
        again = {"k": k.repeat(passes, 1)[None, :, None], "v": v.repeat(passes, 1)[None, :, None]}
        number = torch.ones(1, passes * pairs, 1, dtype=torch.float64)
        _, state = deep_scan(
            network, half_squared_error, params=params, every=pairs, q=again["k"], beta=rate * number, momentum=0.995 * number, **again
        )
        learned = {n: state[f"W.{n}"][:, 0] for n in params}
        return (torch.func.functional_call(network, {n: w[0] for n, w in learned.items()}, (k,)) - v).square().mean()

    with torch.no_grad():
        matrix, deep = error(nn.Linear, 1e-4), error(lambda a, b: mlp(a, b, 16), 1e-4)
    assert (1 - 1e-9) * least <= matrix < 1.05 * least  # it may have arrived
    assert deep < 0.1 * least


@pytest.mark.parametrize("name", ["normalised", "cubic"])
def test_cutting_a_sequence_anywhere_changes_nothing(name):
    given = signals()
    whole, last = run(name, 4, given=given)
    for cut in range(T + 1):
        first, state = run(name, 4, given={n: x[:, :cut] for n, x in given.items()})
        rest, state = run(name, 4, given={n: x[:, cut:] for n, x in given.items()}, state=state)
        assert close(torch.cat([first, rest], 1), whole)
        same(state, last)
    state, parts = None, []
    for t in range(T):
        y, state = run(name, 4, given={n: x[:, t : t + 1] for n, x in given.items()}, state=state)
        parts.append(y)
    assert close(torch.cat(parts, 1), whole)
    same(state, last)


@pytest.mark.parametrize("every", [1, 4])
def test_documents_begin_with_the_weights_and_a_mini_batch_of_their_own(every):
    given = signals()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 5]] = reset[1, [3, 4, 10]] = True
    packed, last = run("mlp", every, given=given, reset=reset)
    for row, cuts in ((0, [0, 5, T]), (1, [0, 3, 4, 10, T])):
        for i, j in zip(cuts, cuts[1:], strict=False):
            y, state = run("mlp", every, given={n: x[row : row + 1, i:j] for n, x in given.items()})
            assert close(y[0], packed[row, i:j])
        same(state, {n: s[row : row + 1] for n, s in last.items()})
    for cut in (2, 4, 7):  # rows that are at different places of their mini-batches
        first, state = run("mlp", every, given={n: x[:, :cut] for n, x in given.items()}, reset=reset[:, :cut])
        rest, state = run("mlp", every, given={n: x[:, cut:] for n, x in given.items()}, state=state, reset=reset[:, cut:])
        assert close(torch.cat([first, rest], 1), packed)
        same(state, last)


def test_no_tokens_and_no_rows():
    y, state = run("mlp", tokens=0)
    assert y.shape == (B, 0, H, V)
    assert torch.equal(state["W.0.weight"][1], weights("mlp")["params"]["0.weight"])
    _, half = run("mlp", tokens=5)
    same(run("mlp", tokens=0, state=half).state, half)
    assert half["count"].tolist() == [2, 2]
    assert run("mlp", batch=0).y.shape == (0, T, H, V)


@pytest.mark.parametrize(("name", "form"), [("normalised", "dual"), ("shared", "dual"), ("cubic", "direct")])
def test_gradients(name, form):
    made, given = weights(name, heads=1), signals(tokens=4, batch=1, heads=1)
    _, state = deep_scan(NETWORKS[name], half_squared_error, every=3, **made, **signals(tokens=1, batch=1, heads=1, seed=1))
    parts = [list(given), [n for n in state if n != "count"], list(made["params"]), list(made["fixed"])]
    leaves = [*given.values(), *(state[n] for n in parts[1]), *made["params"].values(), *made["fixed"].values()]
    reset = torch.tensor([[False, False, False, True]])

    def f(*values):
        values = iter(values)
        x, s, params, fixed = ({n: next(values) for n in names} for names in parts)
        y, after = deep_scan(
            NETWORKS[name], half_squared_error, every=3, form=form, params=params, fixed=fixed, reset=reset,
            state=s | {"count": state["count"]}, **x,
        )  # fmt: skip
        return (y, *(w for n, w in after.items() if n != "count"))

    assert torch.autograd.gradcheck(f, [leaf.clone().requires_grad_() for leaf in leaves], fast_mode=True)


def test_heads_share_keys_and_dtypes_are_kept():
    given = signals()
    shared = given | {n: given[n][:, :, :1] for n in ("q", "k")}
    repeated = given | {n: given[n][:, :, :1].expand(-1, -1, H, -1) for n in ("q", "k")}
    assert close(run("mlp", given=shared).y, run("mlp", given=repeated).y)
    y, state = run("mlp", given={n: x.bfloat16() for n, x in given.items()})
    assert y.dtype == torch.bfloat16
    assert state["W.0.weight"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        layer = DeepLayer(mlp, 8, heads=2, rate=0.1)
        assert layer(torch.randn(1, 5, 8))[1]["W.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("rate", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("network", [nn.Linear, mlp])
def test_what_is_normalised_bears_any_rate(network, rate):
    torch.manual_seed(0)
    layer = DeepLayer(network, 16, heads=2, rate=rate, normalised=True, conv=1, norm="none", feature_map="identity", values="identity")
    for x in (torch.randn(1, 200, 16), torch.ones(1, 200, 16), torch.zeros(1, 200, 16)):
        assert layer(x)[0].isfinite().all()


def test_divergence_is_said():
    ones = {n: torch.ones_like(x) for n, x in signals(False, False, 400).items()}
    with pytest.raises(fw.SignalError, match=r"descent diverged at rates up to 9; lower beta"):
        run("matrix", 1, given=ones | {"beta": 9 * ones["beta"]})
    given = signals()
    given["k"][0, 3, 0, 0] = torch.nan
    with pytest.raises(fw.SignalError, match="signal 'k' is not finite"):
        run("matrix", given=given)


def bad_state(**change):
    state = run("mlp", tokens=2).state
    return lambda: run("mlp", state={n: s for n, s in (state | change).items() if s is not None})


def bad(**change):
    return lambda: deep_scan(NETWORKS["mlp"], half_squared_error, **(weights("mlp") | signals() | change))


BAD = {
    "signal 'beta' (Rate) has shape (2, 11)": bad(beta=torch.zeros(B, T, dtype=torch.float64)),
    "signal 'g' is the log of a decay": bad(g=torch.ones(B, T, H, dtype=torch.float64)),
    "signal 'k' has T = 3, but 'q' has T = 11": bad(k=signals()["k"][:, :3]),
    "reset is torch.int64, expected a bool tensor": bad(reset=torch.zeros(B, T, dtype=torch.int64)),
    "every is 0": bad(every=0),
    "every is 2.0": bad(every=2.0),
    "unknown form 'dul' (did you mean 'dual'?)": bad(form="dul"),
    "0.weight is both in params and in fixed": bad(fixed={"0.weight": weights("mlp")["params"]["0.weight"]}),
    "the network's parameters are 0.weight, 0.bias, 2.weight, 2.bias": bad(params={}),
    "parameter '0.bias' has shape (2, 3), expected (H, ...) = (2, 8)": bad(
        params=weights("mlp")["params"] | {"0.bias": torch.zeros(2, 3, dtype=torch.float64)}
    ),
    "params is empty": bad(params={}, fixed=weights("mlp")["params"]),
    "makes (4,) of a key (4,), expected a value (3,)": bad(v=signals(dv=3)["v"]),
    "state has S.0.bias": bad_state(count=None),
    "state 'count' is ((1,)": bad_state(count=torch.zeros(1, dtype=torch.int64)),
    "heads is 0": lambda: DeepLayer(mlp, 8, heads=0),
    "d_model = 9 is not a multiple of heads = 2": lambda: DeepLayer(mlp, 9, heads=2),
    "every is 0, expected at least 1 token a mini-batch": lambda: DeepLayer(mlp, 8, every=0),
    "rate is -1": lambda: DeepLayer(mlp, 8, rate=-1),
    "d_key = 4 is not d_value = 6": lambda: DeepLayer(mlp, 8, d_key=4, d_value=6, normalised=True),
    "the network has buffers (1.running_mean": lambda: DeepLayer(lambda a, b: nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b)), 8),
    "expected a tensor (B, T, d_model = 8)": lambda: DeepLayer(mlp, 8)(torch.zeros(2, 8)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)


LAYERS = {
    "ttt_linear": {"network": nn.Linear, "normalised": True, "conv": 1, "norm": "none", "feature_map": "identity", "values": "identity"},
    "titans": {"network": mlp, "loss": squared_error, "momentum": True, "forget": True, "rate": 0.02},
    "every token": {"network": lambda a, b: mlp(a, b, 2), "every": 1, "d_key": 5, "d_value": 3, "momentum": True},
    "shared keys": {"network": nn.Linear, "forget": True, "key_heads": 1},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    layer = DeepLayer(**({"d_model": 12, "heads": 2, "every": 4, "rate": 0.1} | LAYERS[name])).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole, last = layer(x)
    assert whole.shape == x.shape
    state, parts = None, []
    for i, j in ((0, 0), (0, 2), (2, 3), (3, 9)):
        y, state = layer(x[:, i:j], state)
        parts.append(y)
    assert close(torch.cat(parts, 1), whole)
    same(state, last)
    whole.square().sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n
        assert p.grad.abs().max() > 0, n
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x)[0], whole)
    _, state = layer.float()(x[:1].float())
    assert layer.state_bytes(9) == sum(s.numel() * s.element_size() for s in state.values())
