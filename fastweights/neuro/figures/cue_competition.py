"""What cues do to each other: overshadowing, overexpectation, conditioned inhibition, and what the delta rule does not predict."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan, unroll
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import figure
from ..curves import EXACT, Curve, rows
from ..protocols import Conditioning, Phase

_RATE = 0.1
_RATIO = 10.0  # variance of the outcome over that of the weights at the start, for the Kalman rule


@experiment(
    section="neuroscience",
    claim="Overshadowing, overexpectation and conditioned inhibition follow from the delta rule; latent inhibition only from a Kalman rule",
    cite="Rescorla and Wagner 1972; Lubow 1973; Dayan and Kakade 2001; Gershman 2015",
    quick=3, default=3, full=4,
)  # fmt: skip
def cue_competition(setting: Setting) -> Result:
    """Overshadowing: AB+ with cues of unlike salience. Overexpectation: A+ and B+ apart, then AB+. Conditioned inhibition: A+ and AB- in
    turn. Latent inhibition: A- before A+. Backward blocking: AB+, then A+.

    The rule is ``delta``, W <- W + beta (v - W k) k^T, run by ``fw.unroll``: presynaptic activity k has the square root of the salience
    alpha_i where cue i is present, the postsynaptic target v is the outcome lambda = 1, beta the learning rate eta, v - W k the prediction
    error (neuromodulator); no eligibility, no heterosynaptic term. V_i = W_i sqrt(alpha_i), so that delta V_i = eta alpha_i (lambda - V),
    V the sum over cues present; it is read after a trial's update.

    Overshadowing: V_A = lambda alpha_A / (alpha_A + alpha_B). Overexpectation: from lambda each, V_i = lambda / 2 + lambda
    (1 - 2 eta)^n / 2. Conditioned inhibition: a round of A+ and AB- is an affine map of (V_A, V_B) with fixed point (lambda, -lambda).

    Latent inhibition is *not* predicted by delta: A- at V_A = 0 has no error, so later learning is as if it had not been. A Kalman rule
    (recursive least squares, ``rls``: the error is written at the gain P k / (r + k^T P k), P the covariance of the weights, which starts
    at I and does not drift here, r the variance of the outcome) takes the cue's weight for better known: V_A = lambda n / (n0 + n + r)
    after n0 trials of A- and n of A+. Its P also couples A and B negatively after AB+, so that A+ alone lowers V_B: backward blocking,
    V_B = lambda n r / ((n + m + r)(n + r) - n^2) after n trials of AB+ and m of A+. Under delta V_B stays.
    """
    trials = setting.pick(quick=30, default=40, full=60)
    shadows = _overshadowing()
    over, inhibition = _overexpectation(trials), _conditioned_inhibition(3 * trials)
    latent, backward = _latent(trials), _backward(trials)
    curves = [shadows, *over, *inhibition, *latent, *backward]
    findings = [curve.finding() for curve in curves]
    findings.append(_fixed_point(20 * trials))
    fresh, exposed = (_run(_pre(n0, 10))[-1, 0] for n0 in (0, trials))
    findings.append(Finding("delta: effect of A- before A+ on V_A (latent inhibition)", [float((fresh - exposed).abs())], "0", high=EXACT))
    return Result(findings, rows(*curves), _draw(shadows, over, inhibition, latent))


def _run(protocol: Conditioning, rate: float = _RATE) -> Tensor:
    """Associative strengths after every trial, (T, cues)."""
    return unroll(rules.delta, **protocol.signals(rate))[0, :, 0, 0] * protocol.scale()


def _end(*protocols: Conditioning) -> Tensor:
    """Strengths after the last trial of each of some protocols of one length, (protocols, cues)."""
    each = [protocol.signals(_RATE) for protocol in protocols]
    together = {name: torch.cat([signals[name] for signals in each]) for name in each[0]}
    W = scan(rules.delta, q=together["k"], **together).state[:, 0, 0]
    return W * torch.stack([protocol.scale() for protocol in protocols])


def _overshadowing() -> Curve:
    """V_A in the end, by the salience of A; that of B is 0.3."""
    alphas, other = [0.1 * i for i in range(1, 11)], 0.3
    # the slowest pair closes its gap by 1 - 0.1 * 0.4 a trial: what is left after 700 is 4e-13
    found = _end(*(Conditioning((Phase("AB+", 700),), {"A": a, "B": other}) for a in alphas))
    shown = [i / 100 for i in range(101)]
    return Curve(
        "overshadowing: V_A", alphas, [a / (a + other) for a in alphas], [found[:, 0].tolist()],
        line=(shown, [a / (a + other) for a in shown]),
    )  # fmt: skip


def _overexpectation(trials: int) -> list[Curve]:
    """V_A and the sum of both, in the second phase."""
    first = 300
    V = _run(Conditioning((Phase("A+ B+", first), Phase("AB+", trials))))[2 * first - 1 :]
    one = [0.5 + 0.5 * (1 - 2 * _RATE) ** n for n in range(trials + 1)]
    both = ("overexpectation: V_A", one, V[:, 0]), ("overexpectation: V_A + V_B", [2 * x for x in one], V.sum(1))
    return [Curve(label, range(trials + 1), expected, [x.tolist()]) for label, expected, x in both]


def _conditioned_inhibition(count: int) -> list[Curve]:
    """V_A and V_B after every round of A+ and AB-; expected from the powers of the round's map about its fixed point."""
    V = _run(Conditioning((Phase("A+ AB-", count),)))[1::2]
    keys = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    first, second = (eye - _RATE * torch.outer(k, k) for k in keys)
    fixed = torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = torch.stack([fixed - torch.linalg.matrix_power(second @ first, n) @ fixed for n in range(1, count + 1)])
    return [
        Curve(f"conditioned inhibition: V_{c}", range(1, count + 1), expected[:, i].tolist(), [V[:, i].tolist()])
        for i, c in enumerate("AB")
    ]


def _fixed_point(rounds: int) -> Finding:
    V = _end(Conditioning((Phase("A+ AB-", rounds),)))[0]
    off = max(abs(float(V[0]) - 1), abs(float(V[1]) + 1))
    return Finding(f"conditioned inhibition: distance to (lambda, -lambda) after {rounds} rounds", [off], "0", high=1e-6)


def _pre(n0: int, n: int) -> Conditioning:
    return Conditioning((Phase("A-", n0), Phase("A+", n)))


def _latent(trials: int) -> list[Curve]:
    """V_A over trials of A+, with and without A- before: delta and Kalman."""
    x, curves = range(1, trials + 1), []
    for n0 in (0, trials):
        found = _run(_pre(n0, trials))[n0:, 0].tolist()
        curves.append(Curve(f"delta: V_A after {n0} of A-", x, [1 - (1 - _RATE) ** n for n in x], [found]))
    for n0 in (0, trials):
        found = _kalman(_pre(n0, trials))[n0:, 0].tolist()
        curves.append(Curve(f"Kalman: V_A after {n0} of A-", x, [n / (n0 + n + _RATIO) for n in x], [found]))
    return curves


def _kalman(protocol: Conditioning) -> Tensor:
    """Strengths after every trial, (T, cues)."""
    signals = protocol.signals(_RATIO)
    r, g = signals.pop("beta"), torch.zeros_like(signals["v"][..., 0])
    return unroll(rules.rls, **signals, r=r, g=g)[0, :, 0, 0]


def _backward(trials: int) -> list[Curve]:
    protocol, r, n = Conditioning((Phase("AB+", trials), Phase("A+", trials))), _RATIO, trials
    x = range(1, trials + 1)
    retold = [n * r / ((n + m + r) * (n + r) - n * n) for m in x]
    same = [0.5 * (1 - (1 - 2 * _RATE) ** n)] * trials
    found = _kalman(protocol)[trials:, 1].tolist(), _run(protocol)[trials:, 1].tolist()
    return [
        Curve("Kalman: V_B over trials of A+ (backward blocking)", x, retold, [found[0]]),
        Curve("delta: V_B over trials of A+ (no backward blocking)", x, same, [found[1]]),
    ]


def _draw(shadows: Curve, over: list[Curve], inhibition: list[Curve], latent: list[Curve]):
    made, (one, two, three, four) = figure(4, width=3.3)
    shadows.draw(one, label=r"$\alpha_A / (\alpha_A + \alpha_B)$, $\alpha_B$ = 0.3")
    one.set_title("overshadowing", fontsize=10)
    one.set_xlabel(r"salience of A, $\alpha_A$")
    one.set_ylabel(r"associative strength $V_A$ (of $\lambda$)")
    for colour, curve in enumerate(over):
        curve.draw(two, colour, label=f"${curve.label.split(': ')[1]}$")
    two.set_ylim(0, 2.1)
    two.set_title("overexpectation", fontsize=10)
    two.set_xlabel("trial of AB+")
    for colour, curve in enumerate(inhibition):
        curve.draw(three, colour, every=6, label=f"${curve.label.split(': ')[1]}$")
    three.set_title("conditioned inhibition", fontsize=10)
    three.set_xlabel("round of A+, AB−")
    marks = (
        ("delta, not exposed", "o", "-"),
        ("delta, exposed", "s", "--"),
        ("Kalman, not exposed", "o", "-"),
        ("Kalman, exposed", "s", "--"),
    )
    for i, (curve, (label, marker, style)) in enumerate(zip(latent, marks, strict=True)):
        curve.draw(four, (0, 6, 2, 1)[i], every=2, label=label, style=style, marker=marker)
    four.set_ylim(-0.03, 1.5)
    four.set_title("latent inhibition", fontsize=10)
    four.set_xlabel("trial of A+")
    for axes in (one, two, three, four):
        axes.legend(frameon=False, fontsize=8)
    return made
