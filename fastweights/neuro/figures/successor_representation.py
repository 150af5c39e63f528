"""The successor representation, learned by temporal differences: what a place predicts, and why place fields grow backwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import figure
from ..curves import Curve, rows
from ..protocols import Laps

_RING = Laps(length=1.0, speed=0.1, count=1)  # m, m/s
_DT = 0.5  # s in each place: 20 places
_TAUS = (0.75, 1.5, 4.0)  # s, how far ahead is predicted


@experiment(
    section="neuroscience",
    claim="Temporal difference learning with features as rewards learns the successor representation, in closed form on a ring",
    cite="Dayan 1993; Mehta, Quirk and Wilson 2000; Stachenfeld, Botvinick and Gershman 2017",
    quick=1, default=3, full=20,
)  # fmt: skip
def successor_representation(setting: Setting) -> Result:
    """An animal runs along places s; phi(s) is one-hot; M(j, i) is how often it expects to be at j soon, when at i.

    The rule is ``td``, W <- W + beta (v + gamma W k' - W k) k^T, run by ``fw.scan``: presynaptic activity k = phi(s_t) at this step and
    k' = phi(s_{t+1}) at the next; the postsynaptic target v = phi(s_t), the features themselves in the place of a reward; beta the learning
    rate; v + gamma W k' - W k the error, a neuromodulator for each postsynaptic unit; no eligibility (that is TD(0)), no heterosynaptic
    term. Time is physical: places that are crossed in dt seconds each and gamma = exp(-dt/tau). W = M; column i is what is predicted from
    place i, row j is the field of cell j, its activity at every place. The present step counts: M(i, i) >= 1. Reads come after writes.

    Ring of n places, one direction: M(j, i) = gamma^((j - i) mod n) / (1 - gamma^n): fields that reach backwards from their place. A
    track run from end to end (no next place at the end), beta < 1, after L laps: M(j, i) = beta sum over m < L of C(m, d)
    (1 - beta)^(m - d) (beta gamma)^d, d = j - i >= 0: the field grows backwards lap by lap. A walk that turns at random on the ring:
    M(j, i) = (r^d + r^(n - d)) / ((1 - r^n) sqrt(1 - gamma^2)) with r = (1 - sqrt(1 - gamma^2)) / gamma, d the distance: fields are
    symmetric. There beta falls as visits^(-0.7), and the field is a mean over cells and walks.
    """
    ring = [_ring(tau) for tau in _TAUS]
    track = [_track(laps, beta=0.3, tau=1.5) for laps in (1, 3, 10, 40)]
    walks, steps = setting.pick(quick=(40, 4000), default=(100, 10000), full=(100, 40000))
    setting.tell(f"{walks} random walks of {steps} steps")
    walk = _walk(walks, steps, 1.5, list(setting.each_seed()))
    findings = [c.finding() for c in (*ring, *track)]
    findings.append(walk.finding(0.06))
    own = len(walk.x) // 2
    skew = [abs(run[own - 1] / run[own + 1] - 1) for run in walk.measured]
    findings.append(Finding("random walk: asymmetry of the field, one place before over one place after", skew, "0", high=0.1))
    return Result(findings, rows(*ring, *track, walk), _draw(ring, track, walk))


def _gamma(tau: float) -> float:
    return math.exp(-_DT / tau)


def _learn(places: Tensor, following: Tensor, beta: Tensor, tau: float, state: Tensor | None = None) -> Tensor:
    """M after a sequence of places, one-hot (B, T, n), and of those that follow; beta (B, T)."""
    k, k_next = places.unsqueeze(2), following.unsqueeze(2)
    gamma = torch.full((*k.shape[:2], 1), _gamma(tau), dtype=k.dtype)
    return scan(rules.td, q=k, k=k, k_next=k_next, v=k, beta=beta.unsqueeze(2), gamma=gamma, state=state).state


def _ring(tau: float) -> Curve:
    """The field of the cell in the middle of the ring, at every place."""
    n = len(_RING.places(_DT))
    # with beta = 1 a lap multiplies the largest error by gamma at least: below 1e-13 in the end
    laps = math.ceil(30 / -math.log(_gamma(tau)))
    places = Laps(_RING.length, _RING.speed, laps).places(_DT)[None]
    M = _learn(places, places.roll(-1, 1), torch.ones(1, places.shape[1], dtype=places.dtype), tau)[0, 0]
    gamma, j = _gamma(tau), n // 2
    expected = [gamma ** ((j - i) % n) / (1 - gamma**n) for i in range(n)]
    return Curve(f"ring, tau = {tau:g} s", _metres(n), expected, [M[j].tolist()])


def _metres(n: int) -> list[float]:
    return [i * _RING.length / n for i in range(n)]


def _track(laps: int, beta: float, tau: float) -> Curve:
    """The same on a track whose end nothing follows."""
    one = _RING.places(_DT)
    n = len(one)
    following = torch.cat([one[1:], torch.zeros_like(one[:1])])
    places, following = (x.repeat(laps, 1)[None] for x in (one, following))
    M = _learn(places, following, torch.full(places.shape[:2], beta, dtype=places.dtype), tau)[0, 0]
    gamma, j = _gamma(tau), n // 2

    def grown(d: int) -> float:
        terms = (math.comb(m, d) * (1 - beta) ** (m - d) * (beta * gamma) ** d for m in range(d, laps))
        return beta * sum(terms) if d >= 0 else 0.0

    return Curve(f"track, after {laps} lap{'s' * (laps > 1)}", _metres(n), [grown(j - i) for i in range(n)], [M[j].tolist()])


def _walk(walks: int, steps: int, tau: float, seeds: list[int]) -> Curve:
    """The field of a cell under a random walk, by how far after it the place is, averaged over cells and walks."""
    n = len(_RING.places(_DT))
    gamma, runs = _gamma(tau), []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        turns = torch.randint(2, (walks, steps + 1), generator=draw) * 2 - 1
        at = turns.cumsum(1) % n
        onehot = torch.eye(n)[at]
        visits = onehot[:, :-1].cumsum(1).gather(2, at[:, :-1, None])[..., 0]
        # a rate of 1 / visits^0.7 forgets the zero start and still averages; sum beta diverges, sum beta^2 does not
        M = _learn(onehot[:, :-1], onehot[:, 1:], visits**-0.7, tau)[:, 0].double().mean(0)
        runs.append([float(torch.diagonal(M.roll(-d, 1)).mean()) for d in range(-n // 2, n // 2)])
    root = math.sqrt(1 - gamma * gamma)
    r = (1 - root) / gamma
    apart = range(-n // 2, n // 2)
    expected = [(r ** abs(d) + r ** (n - abs(d))) / ((1 - r**n) * root) for d in apart]
    return Curve("random walk", [d * _RING.length / n for d in apart], expected, runs)


def _draw(ring: list[Curve], track: list[Curve], walk: Curve):
    made, panels = figure(3, width=3.8)
    titles = "ring, one direction", "track, lap by lap", "ring, random walk"
    for axes, title, curves in zip(panels, titles, (ring, track, [walk]), strict=True):
        for colour, curve in enumerate(curves):
            curve.draw(axes, colour, label=curve.label.split(", ")[-1].replace("tau", r"$\tau$"))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("place (m)")
        axes.legend(frameon=False)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("field of a cell at 0.5 m (expected visits)")
    panels[2].set_xlabel("place, from the cell's own (m)")
    return made
