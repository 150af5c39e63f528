"""Learning a linear map from examples in the context: one descent step, a pass of the delta rule, least squares; and a trained layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import rules
from ..engine.scan import scan
from ..plots import COLOURS, figure
from .experiment import Finding, Result, Setting, experiment


@experiment(
    section="learning to learn",
    claim="Linear attention is one step of gradient descent, delta a pass of many, Mesa least squares; a trained layer finds the best step",
    cite="von Oswald et al. 2023, ICML; Ahn et al. 2023; Mahankali et al. 2024",
    quick=7, default=75, full=300,
)  # fmt: skip
def icl_regression(setting: Setting) -> Result:
    """w ~ N(0, I) in d dimensions, n examples (x_i, w . x_i) without noise, then a query x, all x ~ N(0, I); the risk is E (w . x - W x)^2,
    which is E |w - W|^2.

    Keys are the x_i, values w . x_i, the query is read last. ``hebb_rate`` with one rate eta is a step of gradient descent from zero on
    1/2 sum_i (W x_i - w . x_i)^2; its best rate 1 / (n + d + 1) has the risk d (d + 1) / (n + d + 1). ``delta`` on x_i / |x_i| at rate beta
    has d (1 - beta (2 - beta) / d)^n. ``rls`` with a vanishing penalty (Mesa) has 0 for n >= d. The trained layer has free matrices for
    keys, queries and values of the tokens (x, y), all of d + 1 numbers, and learns on other w: it comes to the risk of the best step.
    """
    d = setting.pick(quick=5, default=5, full=10)
    draws = setting.pick(quick=20_000, default=100_000, full=200_000)
    lengths = [1, 2, 3, 5, 8, 12, 20, 30]
    beta, n_trained = 0.7, 2 * d
    expected = {
        "one step": [d * (d + 1) / (n + d + 1) for n in lengths],
        "delta": [d * (1 - beta * (2 - beta) / d) ** n for n in lengths],
        "least squares": [max(d - n, 0) for n in lengths],
    }
    found: dict[str, list[list[float]]] = {name: [] for name in expected}
    trained = []
    for seed in setting.each_seed():
        draw = torch.Generator().manual_seed(seed)
        sets = [_examples(draws, n, d, draw) for n in lengths]
        found["one step"].append([_risk("hebb_rate", *s, 1 / (n + d + 1)) for n, s in zip(lengths, sets, strict=True)])
        found["delta"].append([_risk("delta", w, k / k.norm(dim=-1, keepdim=True), beta) for w, k in sets])
        found["least squares"].append([_risk("rls", *(x[:2000] for x in s), 1e-9) for s in sets])
        trained.append(_train(d, n_trained, seed, setting) / (d * (d + 1) / (n_trained + d + 1)))
    findings = []
    for name in ("one step", "delta"):
        off = [max(abs(a / b - 1) for a, b in zip(run, expected[name], strict=True)) for run in found[name]]
        findings.append(Finding(f"{name}: largest relative deviation from its risk", off, "0", high=0.1))
    exact = [max(r for r, n in zip(run, lengths, strict=True) if n >= d) for run in found["least squares"]]
    findings.append(Finding("least squares: risk from d examples on", exact, "0", high=1e-3))
    findings.append(Finding("trained layer: risk over that of the best step", trained, "1 within 5 %", low=0.95, high=1.05))
    table = [
        {"learner": name, "examples": n, "risk": sum(run[i] for run in found[name]) / len(found[name]), "expected": expected[name][i]}
        for name in expected
        for i, n in enumerate(lengths)
    ]
    return Result(findings, table, _draw(d, lengths, expected, found, n_trained, trained))


def _examples(draws: int, n: int, d: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """w (draws, d) and keys (draws, n, d)."""
    w, k = (torch.randn(draws, *shape, generator=draw, dtype=torch.float64) for shape in ((d,), (n, d)))
    return w, k


def _risk(rule: str, w: Tensor, k: Tensor, rate: float) -> float:
    """E |w - W|^2, which is E (w . x - W x)^2."""
    k = k.unsqueeze(2)
    v = (k * w[:, None, None]).sum(-1, keepdim=True)
    rates = torch.full(k.shape[:3], rate, dtype=k.dtype)
    given = {"q": k, "k": k, "v": v, "beta": rates, "r": rates, "g": torch.zeros_like(rates)}
    found = rules.get(rule)
    state = scan(found, **{n: given[n] for n in found.signals}).state
    W = (state[0] if isinstance(state, tuple) else state)[:, 0]
    return float((W[:, 0] - w).square().sum(-1).mean())


class _Layer(nn.Module):
    """Linear attention of tokens (x, y) by ``hebb``, with free matrices; the query is (x, 0), and y is the last channel of what is read."""

    def __init__(self, d: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (nn.Parameter(0.1 * torch.randn(d + 1, d + 1, generator=draw)) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = ((tokens @ M.mT).unsqueeze(2) for M in (self.q, self.k, self.v))
        W = scan(rules.hebb, q=q[:, :-1], k=k[:, :-1], v=v[:, :-1]).state[:, 0]  # the query itself is not written
        return (W @ q[:, -1, 0].unsqueeze(-1))[:, -1, 0]


def _train(d: int, n: int, seed: int, setting: Setting) -> float:
    """The risk of a trained layer on 20,000 new maps."""
    layer, draw = _Layer(d, seed), torch.Generator().manual_seed(1000 + seed)
    steps = setting.pick(quick=2000, default=6000, full=15_000)
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        w, x = torch.randn(size, d, generator=draw), torch.randn(size, n + 1, d, generator=draw)
        y = x @ w.unsqueeze(-1)
        shown = torch.cat([y[:, :-1], torch.zeros(size, 1, 1)], 1)
        return torch.cat([x, shown], -1), y[:, -1, 0]

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        tokens, y = batch(256)
        loss = ((layer(tokens) - y) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimiser.step()
        if step % 500 == 0:
            setting.tell(f"seed {seed}: step {step}/{steps}, loss {loss.item():.3f}")
            setting.record({"seed": seed, "step": step, "loss": loss.item()})
    with torch.no_grad():
        tokens, y = batch(100_000)
        return float(((layer(tokens) - y) ** 2).mean())


def _draw(d: int, lengths: list[int], expected: dict, found: dict, n: int, trained: list[float]):
    made, (axes,) = figure(width=5.4)
    for i, (name, label) in enumerate(
        (("one step", "one descent step (hebb_rate)"), ("delta", "delta, beta = 0.7"), ("least squares", "least squares (rls)"))
    ):
        axes.plot(lengths, expected[name], color=COLOURS[i], label=label)
        for run in found[name]:
            axes.plot(lengths, run, "os^"[i], color=COLOURS[i], ms=4)
    axes.plot([n] * len(trained), [t * d * (d + 1) / (n + d + 1) for t in trained], "kx", ms=7, label="trained linear attention")
    axes.set_xlabel("examples in the context")
    axes.set_ylabel(f"risk (d = {d})")
    axes.legend(frameon=False)
    return made
