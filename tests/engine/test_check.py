"""``check`` passes what is right, notices what is wrong, and tells both."""

import pytest
import torch
from rows import AFFINE, NOT_AFFINE, R, name

import fastweights as fw
from fastweights import Key, Value, outer
from fastweights.engine import check as module
from fastweights.language.objective import Objective


@pytest.mark.parametrize("rule", [*AFFINE, *NOT_AFFINE], ids=name)
def test_every_rule_passes(rule):
    report = fw.check(rule)
    assert report.passed, str(report)
    assert {row.what for row in report.rows} >= {"recurrent", "parallel", "chunk"}


def test_a_wrong_objective_fails():
    @fw.rule(objective=Objective("v^T W k", lambda W, k, v: v @ (W @ k), rate=1.0))
    def wrong_sign(W, k: Key, v: Value):
        return W + outer(v, k)

    report = fw.check(wrong_sign)
    assert not report.passed
    assert "FAIL objective" in str(report)


def test_forms_that_differ_fail(monkeypatch):
    monkeypatch.setattr("fastweights.engine.scan.chunked", lambda micro, W, size: module_chunked(micro, W * 1.0001, size))
    report = fw.check(R.delta)
    assert not report.passed
    assert [row.passed for row in report.rows if row.what == "parallel"] == [True, True]
    assert not any(row.passed for row in report.rows if row.what == "chunk" and row.dtype == "float64")


def module_chunked(*args):
    from fastweights.engine.chunk import chunked

    return chunked(*args)


def test_a_body_whose_gradient_is_cut_fails():
    class Broken(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            del ctx, inputs, output

        @staticmethod
        def backward(ctx, g):
            return g * 3

    @fw.rule
    def wrong_gradient(W, k: Key, v: Value):
        if float(k[0]) > 1e9:
            return W
        return W + outer(Broken.apply(v), k)

    assert wrong_gradient.forms == ("recurrent",)
    assert not fw.check(wrong_gradient).passed
    assert module.TOLERANCE <= 1e-10
