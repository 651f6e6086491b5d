"""What the flags --precision, --compile and --device come to, and that nobody is left without a way to run."""

import argparse

import pytest
import torch

import attacks
import cli
import losses
import models


def test_precision_auto_measures_and_explains():
    precision, why = cli.pick_precision("auto", torch.device("cpu"))
    assert precision in ("fp32", "bf16") and "x the speed" in why
    assert cli.pick_precision("fp32", torch.device("cpu"))[0] == "fp32"


@pytest.mark.parametrize("ratio, expected, says", [(0.00417, "fp32", "at 0.0042x"), (1.27, "fp32", "at 1.3x"),
                                                   (12.3, "bf16", "at 12x")])
def test_the_reason_has_two_digits_however_slow_bf16_is(monkeypatch, ratio, expected, says):
    taken = iter((ratio, 1.0))
    monkeypatch.setattr(cli, "seconds", lambda *_: next(taken))
    precision, why = cli.pick_precision("auto", torch.device("cpu"))
    assert precision == expected and f" {says} the speed" in why


def test_bf16_forward_returns_nearly_the_same_logits():
    model, x = models.build_model("wrn-10-1").eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        half, full = cli.forward_pass(model, "bf16")(x), cli.forward_pass(model)(x)
    assert half.dtype == torch.bfloat16 and torch.equal(full, model(x).detach())
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_compile_auto_is_on_for_a_long_run_only_and_says_why():
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    for passes, expected in ((3, "off"), (10**6, "on")):
        chosen, why = cli.pick_compile("auto", model, model, x, passes)
        assert chosen == expected and "minutes" in why
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_compiler_that_fails_leaves_the_eager_model(monkeypatch, capsys):
    def broken(function, **settings):
        def call(x):
            raise RuntimeError("no compiler")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    args = argparse.Namespace(precision="fp32", compile="on")
    _, forward = cli.pick_forward(args, model, x, passes=1)
    assert "failed (RuntimeError)" in capsys.readouterr().out
    assert args.compile == "off"  # what the checkpoint and the JSON are to say
    with torch.no_grad(), models.frozen(model):
        assert torch.equal(forward(x), model(x))


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs"), cli.join_job("cuda"):
        pass


@pytest.mark.parametrize("path, message", [
    ("/dev/null", "cannot be written"), (".", "cannot be written"), ("no/such.json", "folder does not exist")])
def test_outputs_that_cannot_be_files(path, message):
    with pytest.raises(ValueError, match=message):
        cli.check_output("--json", path)


@pytest.mark.parametrize("text", ["8/255", "0.031", "1", "1/3"])
def test_ratios_stay_as_given(text):
    assert cli.ratio(text) == text


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_the_fast_path_computes_what_the_plain_path_computes(compiled):
    """x_adv of channels_last (and compiled) against x_adv of the plain NCHW model, on the frozen model; then the weight
    gradients in train mode, which a graph traced on the frozen model must not have lost. In float64: in float32 the
    sign of a gradient near 0 depends on the order of a sum, which differs from CPU to CPU, and is a whole step."""
    torch.manual_seed(0)
    plain, fast = (models.build_model("wrn-10-1").double() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    plain.to(memory_format=torch.contiguous_format)
    x, y = torch.rand(16, 3, 32, 32, dtype=torch.float64), torch.randint(10, (16,))
    start = attacks.start_perturbation("uniform", x, 8 / 255)
    forward = cli.forward_pass(fast)
    if compiled == "on":
        forward, why = cli.compiled_pass(fast, forward, x)
        assert "to compile" in why
    settings = dict(epsilon=8 / 255, step_size=2 / 255, num_steps=10, random_start=start)
    with models.frozen(plain), models.frozen(fast):
        expected = attacks.pgd(plain, x, y, losses.cross_entropy, **settings)
        x_adv = attacks.pgd(forward, x.to(memory_format=torch.channels_last), y, losses.cross_entropy, **settings)
    assert ((x_adv - expected).abs() < 1e-9).double().mean() >= 0.9999
    assert all(p.grad is None for p in fast.parameters())
    assert (x_adv - x).abs().max() > 7.9 / 255

    for forward_pass in (plain, forward):
        torch.nn.functional.cross_entropy(forward_pass(x), y).backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (q.grad - p.grad).norm() < 1e-9 * p.grad.norm(), name
    for (name, p), q in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12, msg=name)
