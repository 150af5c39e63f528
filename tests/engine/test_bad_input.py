"""Everything that can be passed wrongly is refused by name, with what was expected. One row a case."""

import pytest
import torch
from rows import R, simultaneous, squashed

import fastweights as fw
from fastweights.engine.check import example

GOOD = example(R.gated_delta, 2, 6, 4, 5, 3)
MLSTM = example(R.exp_gated_hebb, 2, 6, 4, 5, 3)


def good(**changes):
    return {n: x for n, x in {**GOOD, **changes}.items() if x is not None}


def delta(**changes):
    return lambda: fw.scan(R.gated_delta, **good(**changes))


def cut(name, *index):
    return {name: GOOD[name][index]}


f64 = torch.float64
CASES = {
    "no rule": (lambda: fw.scan("delta", **GOOD), "the first argument is a rule"),
    "a bare function": (lambda: fw.scan(lambda W, k: W, k=GOOD["k"]), "@fw.rule"),
    "missing rate": (delta(beta=None), "missing signal 'beta'; the signals are q: Query"),
    "missing query": (delta(q=None), "missing signal 'q'"),
    "two missing": (delta(q=None, v=None), "missing signal 'q', 'v'"),
    "misspelt": (delta(betta=GOOD["beta"]), "unknown signal 'betta' (did you mean 'beta'?)"),
    "misspelt alone": (delta(beta=None, rate=GOOD["beta"]), "unknown signal 'rate'"),
    "a signal of another rule": (lambda: fw.scan(R.hebb, **GOOD), "unknown signal"),
    "a list": (delta(v=[1.0]), "signal 'v' is a list, expected a torch.Tensor"),
    "an array": (delta(k=GOOD["k"].numpy()), "signal 'k' is a ndarray"),
    "a number": (delta(beta=0.5), "signal 'beta' is a float"),
    "none": (lambda: fw.scan(R.gated_delta, **{**GOOD, "g": None}), "signal 'g' is a NoneType"),
    "integers": (delta(v=GOOD["v"].long()), "signal 'v' has dtype torch.int64"),
    "booleans": (delta(beta=GOOD["beta"] > 0.5), "signal 'beta' has dtype torch.bool"),
    "complex": (delta(k=GOOD["k"].to(torch.complex64)), "signal 'k' has dtype torch.complex64"),
    "no batch": (delta(**cut("k", 0)), "signal 'k' (Key) has shape (6, 4, 5), expected (B, T, H, K)"),
    "an axis too many": (delta(v=GOOD["v"].unsqueeze(0)), "signal 'v' (Value) has shape (1, 2, 6, 4, 3)"),
    "a rate per channel": (delta(beta=GOOD["k"]), "signal 'beta' (Rate) has shape (2, 6, 4, 5), expected (B, T, H)"),
    "a key without channels": (delta(k=GOOD["beta"]), "signal 'k' (Key) has shape (2, 6, 4)"),
    "other batch": (delta(**cut("v", slice(1))), "signal 'v' has B = 1, but 'q' has B = 2"),
    "other time": (delta(**cut("v", slice(None), slice(5))), "signal 'v' has T = 5, but 'q' has T = 6"),
    "rate of another time": (delta(**cut("beta", slice(None), slice(1))), "signal 'beta' has T = 1"),
    "heads that do not divide": (
        delta(**cut("k", slice(None), slice(None), slice(3))),
        "signal 'k' has 3 heads, which does not divide the 4",
    ),
    "no heads": (delta(**cut("k", slice(None), slice(None), slice(0))), "signal 'k' has 0 heads"),
    "key and query differ": (delta(**cut("q", ..., slice(4))), "signal 'k' has K = 5, but 'q' has K = 4"),
    "decay of other channels": (delta(g=-torch.ones(2, 6, 4, 3, dtype=f64)), "signal 'g' (LogDecay)"),
    "positive decay": (delta(g=GOOD["g"] + 4), "must be <= 0"),
    "a decay instead of its log": (delta(g=GOOD["g"].exp()), "pass decay.log()"),
    "mixed precision": (delta(k=GOOD["k"].float()), "signal 'k' has dtype torch.float32, but 'v' has torch.float64"),
    "single gates beside doubles": (delta(beta=GOOD["beta"].float()), "signal 'beta' has dtype torch.float32"),
    "another device": (delta(k=GOOD["k"].to("meta")), "signal 'k' is on meta, but 'v' is on cpu"),
    "state transposed": (
        delta(state=torch.zeros(2, 4, 5, 3, dtype=f64)),
        "state has shape (2, 4, 5, 3), expected (B, H, ...) = (2, 4, 3, 5)",
    ),
    "state without batch": (delta(state=torch.zeros(4, 3, 5, dtype=f64)), "state has shape (4, 3, 5)"),
    "single state": (delta(state=torch.zeros(2, 4, 3, 5)), "state has dtype torch.float32, expected torch.float64"),
    "state is a list of numbers": (delta(state=[1.0]), "state is a float"),
    "state elsewhere": (delta(state=torch.zeros(2, 4, 3, 5, dtype=f64, device="meta")), "state is on meta"),
    "too many states": (delta(state=(torch.zeros(1), torch.zeros(1))), "state has 2 parts, expected 1: W"),
    "too few states": (lambda: fw.scan(R.exp_gated_hebb, **MLSTM, state=torch.zeros(2, 4, 3, 5, dtype=f64)), "expected 3: W, n, m"),
    "wrong second state": (
        lambda: fw.scan(R.exp_gated_hebb, **MLSTM, state=tuple(torch.zeros(2, 4, 3, 5, dtype=f64) for _ in range(3))),
        "state 'n' has shape",
    ),
    "a decay per channel that the body cannot take": (
        lambda: fw.scan(R.exp_gated_hebb, **{**MLSTM, "g": -torch.ones(2, 6, 4, 5, dtype=f64)}),
        "rule 'exp_gated_hebb'",
    ),
    "unknown form": (delta(form="fast"), "unknown form 'fast'; known: recurrent, parallel, chunk, auto"),
    "misspelt form": (delta(form="paralel"), "did you mean 'parallel'?"),
    "no form": (delta(form=3), "unknown form 3"),
    "unknown backend": (delta(backend="cuda"), "unknown backend 'cuda'; known: torch, cpu, fla, auto"),
    "refused form": (lambda: fw.scan(squashed, **example(squashed), form="chunk"), "form 'chunk' is refused: rule 'squashed'"),
    "refused parallel": (lambda: fw.scan(squashed, **example(squashed), form="parallel"), "It runs in form 'recurrent'"),
    "no chunk": (delta(chunk_size=0), "chunk_size is 0, expected at least 1"),
    "negative chunk": (delta(chunk_size=-16), "chunk_size is -16"),
    "half a chunk": (delta(chunk_size=1.5), "chunk_size is 1.5, expected a whole number"),
    "a chunk that is true": (delta(chunk_size=True), "chunk_size is True, expected a whole number"),
    "chunks of a recurrence": (delta(form="recurrent", chunk_size=4), "chunk_size belongs to the chunk form"),
    "reset as numbers": (delta(reset=torch.zeros(2, 6)), "reset is torch.float32, expected a bool tensor (B, T)"),
    "reset as a list": (delta(reset=[True]), "reset is list"),
    "reset per head": (delta(reset=torch.zeros(2, 6, 4, dtype=torch.bool)), "reset has shape (2, 6, 4), expected (B, T) = (2, 6)"),
    "no value to tell V": (lambda: fw.scan(R.erase, q=GOOD["q"], k=GOOD["k"], beta=GOOD["beta"]), "no signal tells V; pass state="),
    "a step with time": (lambda: fw.step(R.gated_delta, None, **GOOD), "expected (B, H, K)"),
    "a step with another state": (
        lambda: fw.step(R.gated_delta, torch.zeros(1), **{n: x[:, 0] for n, x in GOOD.items()}),
        "state has shape (1,)",
    ),
    "attention with values": (lambda: fw.attention_matrix(R.gated_delta, **GOOD), "takes every signal but 'v'"),
    "attention of nothing": (lambda: fw.attention_matrix(R.hebb), "missing signal"),
    "attention of a squashed rule": (lambda: fw.attention_matrix(squashed, q=GOOD["q"], k=GOOD["k"]), "tanh"),
    "sets of signals forgotten": (lambda: fw.scan(R.delta * 2, **{n: x for n, x in GOOD.items() if n != "g"}), "expected (B, T, H, 2, K)"),
    "unroll without keys": (lambda: fw.unroll(R.hebb, v=GOOD["v"]), "missing signal 'k'"),
    "check of nothing": (lambda: fw.check("delta"), "is a rule"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case):
    call, message = CASES[case]
    with pytest.raises(fw.FastWeightError) as refused:
        call()
    assert message in str(refused.value)
    assert isinstance(refused.value, ValueError)


def test_there_are_many_cases():
    assert len(CASES) >= 40
    assert simultaneous.forms == ("recurrent", "parallel", "chunk")


def test_good_input_is_not_refused():
    fw.scan(R.gated_delta, **GOOD, chunk_size=4, reset=torch.zeros(2, 6, dtype=torch.bool), state=torch.zeros(2, 4, 3, 5, dtype=f64))
