"""Chains of micro-steps: what turned W into what it is now, and how a later step or read is put in terms of an earlier one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .expr import Expr
from .program import Decays, MicroStep

Chain = tuple[MicroStep, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """``S q`` where S is the weights after ``chain``; ``backward``: ``S^T q``."""

    chain: Chain
    q: Expr
    backward: bool = False


@dataclass(frozen=True, eq=False)
class Lin:
    """const + sum of readings. ``axis``: None for a vector, 0 for a row (1, n), 1 for a column (n, 1)."""

    const: Expr | None
    reads: tuple[Reading, ...] = ()
    axis: int | None = None

    def __add__(self, other: Lin) -> Lin:
        return Lin(plus(self.const, other.const), self.reads + other.reads, self.axis)


def plus(a: Expr | None, b: Expr | None) -> Expr | None:
    return b if a is None else a if b is None else a + b


@dataclass
class Folded:
    """The weights after some micro-steps as S (diag(decay) + sum x y^T) + sum u w^T of the weights S before them."""

    decay: Decays
    erase: list[tuple[Expr, Expr]]
    write: list[tuple[Expr, Expr]]

    def read(self, q: Expr) -> tuple[Expr, Expr | None]:
        """``q', c`` such that reading now at q is S q' + c."""
        key, const = self.decay.of(q), None
        for x, y in self.erase:
            key = key + x * (y @ q)
        for u, w in self.write:
            const = plus(const, u * (w @ q))
        return key, const

    def read_back(self, read: Expr, q: Expr) -> Expr:
        """Reading the transpose now at q, given that ``read`` of S."""
        out = self.decay.of(read)
        for x, y in self.erase:
            out = out + y * (x @ read)
        for u, w in self.write:
            out = out + w * (u @ q)
        return out


def is_one(x: Expr | None) -> bool:
    return x is not None and x.op == "constant" and bool((x.args[0] == 1).all())


def times(c: Expr, x: Expr) -> Expr:
    """c * x for a multiplier c."""
    if c.op == "constant" and c.meta.ndim == 0 and abs(c.args[0].item()) == 1:
        return x if c.args[0].item() == 1 else -x
    return c * x


def fold(chain: Chain, start: int) -> Folded:
    """The micro-steps from ``start`` on, none of which looks behind it, as one map of the weights before them."""
    states = [Folded(Decays(), [], [])]
    for i, step in enumerate(chain[start:]):
        now = states[-1]
        erase = [(x, step.decay.of(y)) for x, y in now.erase]
        write = [(u, step.decay.of(w)) for u, w in now.write]
        if step.x is not None and step.y is not None:
            key, const = states[i - step.lag].read(step.x)
            erase.append((key, step.y))
            write += [] if const is None else [(const, step.y)]
        if step.u is not None and step.w is not None:
            write.append((step.u, step.w))
        states.append(Folded(now.decay * step.decay, erase, write))
    return states[-1]


def common(a: Chain, b: Chain) -> int:
    """How many first micro-steps two chains share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x is not y), min(len(a), len(b)))


def shared_version(a: Chain, b: Chain) -> int:
    """The last common version of two chains that nothing later in them looks behind."""
    version = common(a, b)
    for chain in (a, b):
        for i in range(len(chain) - 1, version - 1, -1):
            version = min(version, i - chain[i].lag)
    return version


def since(chain: Chain, base: Chain) -> tuple[int, Folded]:
    """A version of ``base``, and what happened from there until after ``chain``."""
    version = common(chain, base)
    version = version if version == len(chain) else shared_version(chain, base)
    return version, fold(chain, version)


def decays(chain: Chain, by: Decays) -> Chain:
    """The chain, then W <- W diag(a): folded into its last micro-step."""
    if by.linear is None:
        return chain
    *before, last = chain or (MicroStep(),)
    both = last.with_decay(last.decay * by)
    after = {name: by.of(key) for name in "yw" if (key := getattr(last, name)) is not None}
    return (*before, replace(both, **after))


def writes(chain: Chain, left: Lin, key: Expr) -> Chain:
    """The chain, then W <- W + left key^T, in as few micro-steps as it takes."""
    base = chain[:-1] if chain and chain[-1].only_decays else chain
    const, reads = left.const, dict[int, Expr]()
    for reading in left.reads:
        version, later = since(reading.chain, base)
        q, c = later.read(reading.q)
        const = plus(const, c)
        reads[version] = q if version not in reads else reads[version] + q
    for version, x in sorted(reads.items(), reverse=True) or [(len(chain), None)]:
        new = MicroStep(x=x, y=None if x is None else key, u=const, w=None if const is None else key, lag=len(chain) - version)
        merged = _merge(chain[-1], new) if chain else None
        chain = (*chain, new) if merged is None else (*chain[:-1], merged)
        const = None
    return chain


def _merge(last: MicroStep, new: MicroStep) -> MicroStep | None:
    """``last`` then ``new``, which does not decay, as one micro-step, where that is one."""
    lag = max(new.lag - 1, 0)
    if last.only_decays:
        return replace(new.with_decay(last.decay), lag=lag)
    if new.x is not None and (new.lag == 0 or (last.x is not None and not (last.y is new.y and last.lag == lag))):
        return None
    if new.u is not None and last.u is not None and last.w is not new.w:
        return None
    out = last if new.x is None else replace(last, x=plus(last.x, new.x), y=new.y, lag=lag)
    return out if new.u is None else replace(out, u=plus(last.u, new.u), w=new.w)
