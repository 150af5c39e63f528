"""Synaptic mechanisms with traces, as rules: what is written to W is driven by states that spikes leave behind and that decay.

In all of them a row of W is a postsynaptic neuron and a column a presynaptic one; ``k`` is presynaptic and ``v`` postsynaptic activity, the
number of spikes (or rate times dt) in a step; every ``g`` is the log decay of a step, -dt / tau (``spikes.log_decay``). So exponentials
are followed exactly: where spikes lie on the grid, what they do does not depend on dt. States that are zero are a synapse at rest.

One pair at 10 ms, presynaptic first, changes the weight by A+ exp(-10 ms / tau):

>>> from fastweights import scan
>>> from fastweights.neuro.spikes import Pairing, log_decay, steady
>>> pre, post = (s.reshape(1, -1, 1, 1) for s in Pairing(interval=0.010, count=1).render(dt=0.001))
>>> g = log_decay(tau=0.020, dt=0.001)
>>> numbers = steady(1, pre.shape[1], a_plus=1.0, a_minus=1.0, g_pre=g, g_post=g)
>>> W, x, z = scan(stdp, q=pre, k=pre, v=post, **numbers).state
>>> round(W.item(), 6), round(math.exp(-0.010 / 0.020), 6)
(0.606531, 0.606531)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..language.decorator import outer, rule
from ..language.errors import SignalError
from ..language.roles import Gate, Key, KeyState, LogDecay, Matrix, Query, Rate, Scalar, Value, ValueLogDecay, ValueState
from ..language.rule import Rule


@rule(cite="Gerstner et al. 1996, Nature 383; Song, Miller and Abbott 2000, Nature Neuroscience 3; Morrison, Diesmann and Gerstner 2008")
def stdp(W, x: KeyState, z: ValueState, k: Key, v: Value, a_plus: Rate, a_minus: Rate, g_pre: LogDecay, g_post: ValueLogDecay):
    """STDP of all pairs of spikes, as two traced writes: a postsynaptic spike writes the presynaptic trace x, a presynaptic spike takes
    away the postsynaptic trace z. The traces are read before the spikes of the step enter them: a pair at dt = 0 does nothing."""
    x, z = g_pre.exp() * x, g_post.exp() * z
    return W + a_plus * outer(v, x) - a_minus * outer(z, k), x + k, z + v


@rule(cite="Morrison, Aertsen and Diesmann 2007, Neural Computation 19; Morrison, Diesmann and Gerstner 2008 (symmetric nearest-neighbour)")
def nearest_stdp(W, x: KeyState, z: ValueState, k: Key, v: Value, a_plus: Rate, a_minus: Rate, g_pre: LogDecay, g_post: ValueLogDecay):
    """STDP of nearest neighbours: as ``stdp``, but a spike sets its trace to one, so that it is paired with the last spike of the other
    side alone; for spikes k, v of 0 or 1."""
    x, z = g_pre.exp() * x, g_post.exp() * z
    return W + a_plus * outer(v, x) - a_minus * outer(z, k), (1 - k) * x + k, (1 - v) * z + v


@rule(
    cite="Tsodyks and Markram 1997, PNAS 94; Tsodyks, Pawelzik and Markram 1998, Neural Computation 10; Mongillo et al. 2008, Science 319"
)
def short_term(W, f: KeyState, d: KeyState, q: Query, U: Gate, g_f: LogDecay, g_d: LogDecay):
    """Short-term plasticity: presynaptic spikes q read W through what they release, y = W (u x q), and leave W as it is. u = U + (1 - U) f
    is utilisation, facilitated by earlier spikes (f decays with tau_F), x = 1 - d are the resources left (d decays with tau_D)."""
    f, d = g_f.exp() * f, g_d.exp() * d
    released = (U + (1 - U) * f) * (1 - d) * q
    return W, f + U * (1 - f) * q, d + released, W @ released


@rule(cite="Bittner et al. 2017, Science 357; Gerstner et al. 2018, Front. Neural Circuits 12")
def btsp(W, e: KeyState, i: ValueState, k: Key, v: Value, beta: Rate, g_e: LogDecay, g_i: ValueLogDecay):
    """Behavioural time scale plasticity, unbounded: Hebb's rule on traces of seconds, an eligibility e that presynaptic activity k leaves
    and an instructive signal i that dendritic plateaus v leave. Both are read after the step's own activity entered them."""
    e, i = g_e.exp() * e + k, g_i.exp() * i + v
    return W + beta * outer(i, e), e, i


@dataclass(frozen=True)
class Gain:
    """A sigmoid, scaled to be 0 at 0 and 1 at 1: q(s) = (p(s) - p(0)) / (p(1) - p(0)) with p(s) = sigmoid(slope (s - half)).

    >>> gain = Gain(half=0.2, slope=10.0)
    >>> gain(torch.tensor([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """

    half: float
    slope: float

    def __post_init__(self) -> None:
        if not (self.slope > 0 and math.isfinite(self.slope) and math.isfinite(self.half)):
            raise SignalError(f"a gain has a finite half and a slope > 0, got half = {self.half}, slope = {self.slope}")

    def __call__(self, s):
        low, high = (1 / (1 + math.exp(-self.slope * (at - self.half))) for at in (0.0, 1.0))
        return (torch.sigmoid(self.slope * (s - self.half)) - low) / (high - low)


@functools.lru_cache(maxsize=32)
def bounded_btsp(up: Gain, down: Gain) -> Rule:
    """Behavioural time scale plasticity with bounds: weak synapses are potentiated, strong ones depressed, as the overlap e i commands.

    W <- W + r_up up(e i) (W_max - W) - r_down down(e i) W for one postsynaptic neuron a head, whose instructive signal i reaches all its
    synapses, so that the decay 1 - r_up up - r_down down is one per key channel. The value ``v`` is W_max, ``k`` presynaptic activity,
    ``p`` the plateau, ``r_up`` and ``r_down`` the largest shares that a step changes. Source: Milstein et al. 2021, eLife 10:e73046.

    >>> bounded_btsp(Gain(0.3, 10.0), Gain(0.1, 20.0)).kind
    'decay key, erase none'
    """

    @rule(name="bounded_btsp", cite="Milstein et al. 2021, eLife 10:e73046")
    def body(W, e: KeyState, i: KeyState, k: Key, v: Value, p: Scalar, r_up: Rate, r_down: Rate, g_e: LogDecay, g_i: LogDecay):
        """BTSP between 0 and the largest weight v: what the overlap of eligibility e and instruction i raises, and what it lowers."""
        e, i = g_e.exp() * e + k, g_i.exp() * i + p
        raised, lowered = r_up * up(e * i), r_down * down(e * i)
        return W * (1 - raised - lowered) + outer(v, raised), e, i

    return body.made_by(bounded_btsp, up, down)


@rule(cite="Izhikevich 2007, Cerebral Cortex 17; Florian 2007, Neural Computation 19")
def rewarded_stdp(
    W, E: Matrix, x: KeyState, z: ValueState, k: Key, v: Value, r: Scalar, a_plus: Rate, a_minus: Rate,
    g: LogDecay, g_pre: LogDecay, g_post: ValueLogDecay,
):  # fmt: skip
    """Three factors with spikes: ``stdp`` writes the eligibility, and the neuromodulator r turns what is left of it into weight."""
    E, x, z = stdp(g.exp() * E, x, z, k, v, a_plus, a_minus, g_pre, g_post)
    return W + r * E, E, x, z


@rule(cite="Urbanczik and Senn 2014, Neuron 81")
def dendritic_error(W, k: Key, v: Value, beta: Rate, a: Gate, n: Gate):
    """The mismatch of soma and dendrite: the dendrite predicts the soma by a W k, a teacher nudges the soma from there to v by the share n,
    and the synapse learns from the difference: the delta rule for the value v / a with rate beta n a."""
    dendrite = a * (W @ k)
    soma = (1 - n) * dendrite + n * v
    return W + beta * outer(soma - dendrite, k)
