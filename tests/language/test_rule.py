"""Rules as values: what can be written, combined, compared, shown, and what is refused."""

import pytest
import torch
from rows import R

import fastweights as fw
from fastweights import Key, KeyVector, LogDecay, Query, Rate, Value, ValueVector, outer
from fastweights.language.expr import Tape
from fastweights.neuro.rules import synaptic_chain


@fw.rule
def correct_then_forget(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    W = W + outer(beta * (v - W @ k), k)
    return W * g.exp()


def test_identities():
    assert R.erase >> R.write == R.delta
    assert R.decay >> R.delta == R.gated_delta
    assert R.oja == R.delta.T
    assert R.gated_oja == R.gated_delta.T
    assert R.delta == R.oja.T
    assert R.gated_delta == R.gated_delta.T.T
    assert R.delta * 1 == R.delta
    assert (R.delta * 2) * 3 == R.delta * 6


def test_differences():
    assert R.delta != R.gated_delta
    assert correct_then_forget != R.gated_delta
    assert R.delta >> R.decay == correct_then_forget
    assert R.delta * 2 != R.delta
    assert R.hebb != R.decayed_hebb
    assert R.delta != "delta"


def test_a_bound_that_only_shows_on_large_inputs_makes_another_rule():
    @fw.rule
    def bounded(W, k: Key, v: Value, beta: Rate):
        return W + outer(beta * torch.clamp(v - W @ k, -10, 10), k)

    assert bounded != R.delta


def test_rules_are_hashable_frozen_values():
    same = R.delta.T.T
    assert {R.delta: 1}[same] == 1
    assert len({R.delta, same, R.oja, R.gated_delta}) == 3
    with pytest.raises(AttributeError):
        R.delta.name = "other"


def test_repr_equation_and_latex():
    assert repr(R.delta) == "delta(k: Key, v: Value, beta: Rate): W ← W + β (v − W k) kᵀ"
    assert R.delta.latex() == r"W \leftarrow W + \beta (v - W k) k^\top"
    assert R.implicit_delta.latex() == r"W \leftarrow W + \frac{\beta}{1 + \beta k^\top k} (v - W k) k^\top"
    assert R.exp_gated_hebb.equation().endswith("with s1 = max(g + m, i), s2 = exp(g + m − s1), s3 = exp(i − s1), s4 = s2 n + s3 k")
    assert "diag(b) W" in fw.rule(lambda_row).equation()


def lambda_row(W, k: Key, v: Value, b: ValueVector):
    return b[:, None] * W + outer(v, k)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (R.hebb, "decay none, erase none"),
        (R.decayed_hebb, "decay scalar, erase none"),
        (R.delta, "decay none, erase tied"),
        (R.gated_delta, "decay scalar, erase tied"),
        (R.generalised_delta, "decay scalar, erase free"),
        (correct_then_forget, "decay scalar, erase tied"),
        (R.oja, "decay none, erase tied, acts on rows"),
        (R.delta * 2, "decay none, erase tied, 2 micro-steps"),
        (R.gated_delta * 2, "decay scalar, erase tied, 2 micro-steps"),
    ],
)
def test_the_class_is_derived(rule, kind):
    assert rule.program.kind == kind


def test_a_decay_per_key_channel_is_its_own_class():
    shapes = {"W": (3, 4), "q": (4,), "k": (4,), "v": (3,), "beta": (), "g": (4,)}
    assert R.gated_delta.trace_for(shapes).program.kind == "decay key, erase tied"


def test_the_decay_of_a_repeated_rule_acts_once():
    first, second = (R.gated_delta * 2).program.steps
    assert first.log_decay is not None
    assert second.log_decay is None


def test_many_writings_of_one_rule_have_one_program():
    @fw.rule
    def a(W, k: Key, v: Value, beta: Rate):
        return W + torch.outer(beta * (v - W.matmul(k)), k)

    @fw.rule
    def b(W, k: Key, v: Value, beta: Rate):
        return W - (beta * W @ k - beta * v)[:, None] * k[None, :]

    @fw.rule
    def c(W, k: Key, v: Value, beta: Rate):
        error = torch.mv(W, k).neg() + v
        return torch.add(W, outer(error, k), alpha=1.0) - (1 - beta) * error.unsqueeze(1) @ k.unsqueeze(0)

    @fw.rule
    def d(W, k: Key, v: Value, beta: Rate):
        return W.sub(outer(k, W @ k - v).T / (1 / beta))

    for rule in (a, b, c, d):
        assert rule == R.delta
        assert rule.program.kind == "decay none, erase tied"


def test_transposing_an_asymmetric_rule():
    @fw.rule
    def scaled(W, k: Key, v: Value, b: KeyVector):
        return W * b + outer(v, k)

    assert scaled.T.signals["b"].role.name == "ValueVector"
    assert scaled.T.program.transposed
    assert fw.rule(lambda_row) == scaled.T


def test_a_rule_is_a_function():
    W, k, v = torch.zeros(3, 4), torch.ones(4), torch.ones(3)
    assert torch.equal(R.hebb(W, k, v), torch.ones(3, 4))
    assert torch.equal(R.hebb(W, v=v, k=k), torch.ones(3, 4))


@pytest.mark.parametrize(
    ("args", "kwargs", "wrong"),
    [
        ((), {}, "missing a required argument: 'W'"),
        ((1, 2), {}, "missing a required argument: 'v'"),
        ((1, 2, 3, 4), {}, "too many positional arguments"),
        ((1, 2), {"v": 3, "k": 4}, "multiple values for argument 'k'"),
        ((1, 2, 3), {"beta": 4}, "got an unexpected keyword argument 'beta'"),
    ],
)
def test_a_function_of_other_arguments_says_so(args, kwargs, wrong):
    with pytest.raises(TypeError, match=f"^hebb\\(W, k, v\\) is the body, for one token and one head: {wrong}; fw.scan"):
        R.hebb(*args, **kwargs)


def test_descend_finds_rules():
    assert fw.descend(lambda W, k, v: 0.5 * ((v - W @ k) ** 2).sum()) == R.delta
    assert fw.descend(lambda W, k, v: 0.5 * (v - W @ k) @ (v - W @ k)) == R.delta
    assert fw.descend(lambda W, k, v: -(v @ (W @ k))) == R.hebb_rate
    assert fw.descend(lambda W, k, v: 0.5 * (k - W.mT @ v).square().sum()) == R.oja

    def ridge(W, k: Key, v: Value, lam: Rate):
        return 0.5 * ((v - W @ k) ** 2).sum() + 0.5 * lam * (W**2).sum()

    assert fw.descend(ridge).program.kind == "decay scalar, erase tied"


def test_descend_on_other_objectives_runs_recurrent_and_checks():
    for loss in (
        lambda W, k, v: torch.nn.functional.huber_loss(W @ k, v),
        lambda W, k, v: (v - W @ k).abs().sum(),
        lambda W, k, v: -torch.cosine_similarity(W @ k, v, dim=0),
        lambda W, k, v: torch.logsumexp(W @ k, 0) - v @ (W @ k),
    ):
        rule = fw.descend(loss)
        assert rule.forms == ("recurrent",)
        assert "of a read of W" in rule.explain()
        assert fw.check(rule).passed


def test_a_rule_says_which_forms_it_lacks():
    assert "has every form" in fw.rules.delta.explain()
    assert "no parallel form (its matrices are affine together" in fw.rules.eligibility.explain()
    assert "rules.py" in synaptic_chain.explain()  # also where a rule is not in the catalogue, its own line


REFUSED = {
    "needs a role": lambda: fw.rule(lambda W, k: W),
    "no arguments": lambda: fw.rule(lambda: 0),
    "nothing in place": lambda: fw.rule(_in_place).program,
    "nothing in place, but 'x[...] = ...' does": lambda: fw.rule(_item).program,
    "add_": lambda: fw.rule(_add_).program,
    "returns 3 values": lambda: fw.rule(_three).program,
    "returns W of shape (2, 4), but W has shape (3, 4)": lambda: fw.rule(_smaller).program,
    "fails on tensors": lambda: fw.rule(_fails).program,
    "at least 1": lambda: R.delta * 0,
    "has no transpose": lambda: R.bonus_hebb.T,
    "is a Rate in one": lambda: R.delta >> fw.rule(_other_beta),
    "import the roles": lambda: fw.rule(_unknown_role),
    "did you mean 'gated_delta'": lambda: R.get("gated_dleta"),
    "is not the name of a rule": lambda: R.get("delta +"),
    "rules combine by": lambda: R.get("delta + hebb"),
}


def _in_place(W, k: Key, v: Value):
    W += outer(v, k)
    return W


def _item(W, k: Key, v: Value):
    k[0] = 1.0
    return W + outer(v, k)


def _add_(W, k: Key, v: Value):
    return W.add_(outer(v, k))


def _three(W, k: Key, v: Value):
    return W, v, k


def _smaller(W, k: Key, v: Value):
    return W[:2]


def _fails(W, k: Key, v: Value):
    return W + outer(k, v)


def _other_beta(W, k: Key, beta: Key):
    return W * beta


def _unknown_role(W, k: "Kye"):  # noqa: F821
    return W


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_a_rule_is_refused_with_the_reason(message):
    with pytest.raises(fw.FastWeightError) as refused:
        REFUSED[message]()
    assert message in str(refused.value)


def test_names_compose():
    assert R.get("delta * 2") == R.delta * 2
    assert R.get("(erase >> write).T") == R.oja


def test_fingerprints_survive_a_rewrite_and_notice_a_change():
    import json

    stored = json.loads(json.dumps(R.gated_delta.fingerprint))
    assert (R.decay >> R.delta).matches(stored)
    assert not correct_then_forget.matches(stored)


def test_equal_expressions_are_one_node():
    tape = Tape()
    k = tape.leaf("k", (3,))
    assert (k * 2).exp() is (k * 2).exp()
    assert k[0] is k[0]
    assert k[:, None] is not k[None]


def test_tuples_of_tensors_unpack():
    @fw.rule
    def halves(W, k: Key, v: Value):
        a, b = k.chunk(2)
        c, _ = torch.sort(torch.cat([b, a]))
        return W + outer(v, c)

    assert fw.check(halves).passed


def test_a_read_out_of_two_reads():
    @fw.rule
    def two(W, q: Query, k: Key, v: Value):
        old = W @ q
        W = W + outer(v, k)
        return W, torch.cat([old[:1], (W @ q)[1:]])

    assert fw.check(two).passed
    assert [read.version for read in two.program.reads] == [0, 1]


def test_a_column_times_a_row_is_shown_as_an_outer_product():
    @fw.rule
    def by_axes(W, k: Key, v: Value):
        return W + v[:, None] * k

    @fw.rule
    def by_unsqueeze(W, k: Key, v: Value):
        return W + v.unsqueeze(1) * k.unsqueeze(0)

    assert by_axes.equation() == by_unsqueeze.equation() == R.hebb.equation()
