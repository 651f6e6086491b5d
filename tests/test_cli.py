"""What the flags --precision, --compile and --device come to, and that nobody is left without a way to run."""

import pytest
import torch

import cli
import models


def test_precision_auto_measures_and_explains():
    precision, why = cli.pick_precision("auto", torch.device("cpu"))
    assert precision in ("fp32", "bf16") and "x the speed" in why
    assert cli.pick_precision("fp32", torch.device("cpu"))[0] == "fp32"


def test_bf16_forward_returns_nearly_the_same_logits():
    model, x = models.build_model("wrn-10-1").eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        half, full = cli.forward_pass(model, "bf16")(x), cli.forward_pass(model)(x)
    assert half.dtype == torch.bfloat16 and torch.equal(full, model(x).detach())
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_compile_auto_is_off_for_a_short_run_and_says_why():
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    forward, chosen, why = cli.pick_compiled("auto", model, "fp32", x, passes=3)
    assert chosen == "off" and "minutes" in why and forward(x).shape == (2, 10)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_compiler_that_fails_leaves_the_eager_model(monkeypatch):
    def broken(function, **settings):
        def call(x):
            raise RuntimeError("no compiler")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    forward, chosen, why = cli.pick_compiled("on", model, "fp32", x, passes=3)
    assert chosen == "off" and "RuntimeError" in why
    with torch.no_grad(), models.frozen(model):
        assert torch.equal(forward(x), model(x))


@pytest.mark.parametrize("text", ["8/255", "0.031", "1", "1/3"])
def test_ratios_stay_as_given(text):
    assert cli.ratio(text) == text
