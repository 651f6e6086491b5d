"""What the flags --precision, --compile and --device come to, and that nobody is left without a way to run."""

import argparse
import functools

import numpy as np
import pytest
import torch
from helpers import SmallNet, fails_in_one_line, record_on_a_cpu
from test_train import TINY, without_times

import attacks
import checkpoints
import eval_attacks
import losses
import models
import runtime
import train_cifar


def test_precision_auto_measures_and_explains():
    precision, why = runtime.pick_precision("auto", torch.device("cpu"))
    assert precision in ("fp32", "bf16") and "CPU" in why
    assert runtime.pick_precision("fp32", torch.device("cpu"))[0] == "fp32"


@pytest.mark.parametrize("ratio, expected, says", [(0.00417, "fp32", "is not faster"), (1.27, "fp32", "is not faster"),
                                                   (12.3, "bf16", "is faster")])
def test_bf16_is_taken_where_it_is_clearly_faster(monkeypatch, ratio, expected, says):
    taken = iter((ratio, 1.0))
    monkeypatch.setattr(runtime, "shortest_seconds", lambda *_: next(taken))
    precision, why = runtime.pick_precision("auto", torch.device("cpu"))
    assert precision == expected and says in why


def test_bf16_forward_returns_nearly_the_same_logits():
    model, x = models.build_model("wrn-10-1").eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        half, full = runtime.plain_pass(model, "bf16")(x), runtime.plain_pass(model)(x)
    assert half.dtype == torch.bfloat16 and torch.equal(full, model(x).detach())
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_compile_auto_is_on_for_a_long_run_only_and_says_why():
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    for passes, expected, says in ((0, "off", "does without"), (3, "off", " seconds, too little"),
                                   (10**8, "on", " days, take a GPU"), (10**10, "on", " months, take a GPU")):
        chosen, why = runtime.pick_compile("auto", model, model, x, passes, "take a GPU")
        assert chosen == expected and says in why
    assert model.training and all(p.requires_grad for p in model.parameters())


def broken_compiler(fails):
    """In the place of torch.compile: what it returns raises where fails(x) says so."""
    def compile(function, **settings):
        def call(*inputs):
            if fails(*inputs):
                raise RuntimeError("no compiler\nand much more")
            return function(*inputs)
        return call
    return compile


@pytest.mark.parametrize("fails_in", ["eval", "train"])
@pytest.mark.parametrize("asked, strict", [("auto", True), ("on", False), ("on", True)])
def test_a_compiler_that_fails(fails_in, asked, strict, monkeypatch, capsys):
    """Also in the training step's graph only: where it was not asked for, or a run goes on, eager code is run."""
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    monkeypatch.setattr(torch, "compile", broken_compiler(lambda x: model.training == (fails_in == "train")))
    monkeypatch.setattr(runtime, "COMPILE_PAYS_MINUTES", {"cpu": 0})
    args = argparse.Namespace(precision="fp32", compile=asked)

    def rehearsal(forward):
        runtime.attack_pass(model, forward, x)
        forward(x).sum().backward()

    if asked == "on" and strict:
        with pytest.raises(runtime.CompileFailed, match="^--compile on failed, RuntimeError: no compiler$"):
            runtime.forward_pass(args, model, x, 1, rehearsal, strict=strict)
        return
    forward = runtime.forward_pass(args, model, x, 1, rehearsal, strict=strict)
    assert capsys.readouterr().out.endswith(
        "--compile on failed, RuntimeError: no compiler; going on with --compile off\n")
    assert args.compile == "off"  # what the checkpoint and the JSON are to say
    with torch.no_grad(), models.frozen(model):
        assert torch.equal(forward(x), model(x))
    args.compile = "on"  # an evaluation does not try what it does not do
    if fails_in == "train":
        runtime.forward_pass(args, model, x, passes=1)
        assert args.compile == "on"


def test_a_compiler_that_was_asked_for_and_fails_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", broken_compiler(lambda *_: True))
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main(["--defense", "madry", *TINY, "--compile", "on", "--out-dir", str(tmp_path / "run")])
    assert exit_info.value.code == ("train_cifar.py: --compile on failed, RuntimeError: no compiler; "
                                    "no checkpoint was written yet")


def test_cuda_graphs_on_a_cpu_are_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x))
    args = argparse.Namespace(precision="fp32", compile="graphs")
    runtime.forward_pass(args, models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32), passes=1)
    assert args.compile == "on" and "compile on: no CUDA graphs on a CPU\n" in capsys.readouterr().out


def test_what_fails_in_one_process_is_used_in_none(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x))
    monkeypatch.setattr(runtime, "any_process", lambda *flags: [True])
    args = argparse.Namespace(precision="fp32", compile="on")
    runtime.forward_pass(args, models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32), passes=1, strict=False)
    assert args.compile == "off" and "--compile on failed, in another process" in capsys.readouterr().out


def test_a_rehearsal_leaves_no_trace(tmp_path, monkeypatch):
    """Of training: the weights after a step are those without one."""
    found = []
    for rehearsed in (True, False):
        if not rehearsed:
            monkeypatch.setattr(runtime, "forward_pass", lambda args, model, *_, **__: runtime.plain_pass(model))
        monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs))
        out = tmp_path / str(rehearsed)
        train_cifar.main(["--defense", "mart", *TINY, "--epochs", "1", "--compile", "on", "--out-dir", str(out)])
        found.append(checkpoints.load(out / "last.pt")["state_dict"])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs"), runtime.join_job("cuda"):
        pass


@pytest.mark.parametrize("path, message", [
    ("/dev/null", "cannot be written"), (".", "cannot be written"), ("no/such.json", "folder does not exist")])
def test_outputs_that_cannot_be_files(path, message):
    with pytest.raises(ValueError, match=message):
        runtime.check_output("--json", path)


@pytest.mark.parametrize("text", ["8/255", "0.031", "1", "1/3"])
def test_ratios_stay_as_given(text):
    assert runtime.ratio(text) == text


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
    forward = runtime.fast_pass(fast, runtime.plain_pass(fast), x, compiled)
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


def test_passes_for_batches_of_many_sizes_are_all_compiled(monkeypatch):
    """torch gives up after so many versions of one code object, which all forward passes would share."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = SmallNet()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for size in (2, 3, 4, 5):
            x = torch.rand(size, 3, 8, 8)
            forward = runtime.fast_pass(model, runtime.plain_pass(model), x, "on")
            runtime.attack_pass(model, forward, x)
            forward(x)


@pytest.mark.parametrize("flags", [
    ["standard"], ["madry"], ["trades"], ["mart", "--spat-alpha", "0.3"], ["madry", "--early-stop", "1"]], ids=" ".join)
def test_recorded_training_is_the_eager_one(flags, tmp_path, monkeypatch, no_curves):
    """To the bit, with a stand-in that overwrites what it handed out: so nothing is kept that a CUDA graph overwrites,
    no learning rate is recorded, and what is recorded is recorded once."""
    argv = ["--defense", *flags, *TINY, "--lr-schedule", "onecycle"]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "off")])
    recorded = record_on_a_cpu(monkeypatch)
    train_cifar.main([*argv, "--compile", "graphs", "--out-dir", str(tmp_path / "graphs")])
    # the update, validation's attack; the attack, whose step is another, and the logits of the shares, TRADES' target
    assert len(recorded) == (2 if flags == ["standard"] else 4)
    graphs, off = (checkpoints.load(tmp_path / level / "last.pt") for level in ("graphs", "off"))
    assert (graphs["args"]["compile"], off["args"]["compile"]) == ("graphs", "off")
    assert all(torch.equal(graphs["state_dict"][key], off["state_dict"][key]) for key in off["state_dict"])
    assert without_times(tmp_path / "graphs/log.csv") == without_times(tmp_path / "off/log.csv")


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--restarts", "2", "--any-step"], ["--pool"]])
def test_recorded_evaluation_is_the_eager_one(flags, model_path, tmp_path, monkeypatch):
    """A row of bf16 may have one of float32 in between: the margin with κ 0."""
    argv = ["--model-path", model_path, "--attacks", "natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls",
            "--alphas", 0, 1, "--kappas", 50, 0, "--num-images", 6, "--batch-size", 4, "--num-steps", 2,
            "--cw-steps", 2, "--precision", "fp32", "--save-examples", tmp_path / "e.npz", "--save-images", *flags]
    found = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs))
    for level in ("on", "graphs"):
        if level == "graphs":
            recorded = record_on_a_cpu(monkeypatch)
        assert eval_attacks.main(list(map(str, [*argv, "--compile", level])))["compile"] == level
        with np.load(tmp_path / "e.npz") as file:
            found.append({name: file[name] for name in file})
    assert len(recorded) >= 1
    assert len(found[0]) == 1 + 3 * 8 and all(np.array_equal(found[1][name], array) for name, array in found[0].items())
    assert np.abs(found[0]["images/FGSM"] - found[0]["images/Natural"]).max() > 0.01


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", ["other values", "no numbers", "error"])
def test_a_recording_that_is_not_the_function_is_not_used(fault, strict, monkeypatch, capsys):
    record_on_a_cpu(monkeypatch)
    model, x = SmallNet(), torch.rand(4, 3, 8, 8)
    forward = runtime.fast_pass(model, runtime.plain_pass(model), x, "graphs", strict)
    if fault == "error":
        monkeypatch.setattr(runtime.Recording, "__init__", lambda *_: torch.zeros(2).view(3))
    else:
        factor = float("nan") if fault == "no numbers" else 1.05
        monkeypatch.setattr(runtime.Recording, "__call__", lambda self, x: 2 * x * factor)
    if strict:
        with pytest.raises(runtime.CompileFailed, match="--compile graphs failed, "):
            forward.recorded(lambda x: 2 * x)(x)
    else:
        assert torch.equal(forward.recorded(lambda x: 2 * x)(x), 2 * x)
        assert capsys.readouterr().err.startswith("a step could not be recorded, ")


def test_a_recording_is_found_again_by_what_it_does(monkeypatch):
    """Equal functools.partials share one; another α, radius or step does not, nor does another shape have one."""
    recorded = record_on_a_cpu(monkeypatch)
    model, x, y = SmallNet().eval().requires_grad_(False), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    forward = runtime.RecordedPass(model, runtime.plain_pass(model), x)

    def attack(alpha=0.1, epsilon=0.1, step_size=0.02, x=x):
        settings = dict(epsilon=epsilon, step_size=step_size, num_steps=2, random_start="none")
        found, expected = (attacks.pgd(by, x, y[:len(x)], functools.partial(losses.lsce, alpha=alpha), **settings)
                           for by in (forward, model))
        assert torch.equal(found, expected)
        return len(recorded)

    assert [attack(), attack(), attack(alpha=0.2), attack(), attack(epsilon=0.05), attack(step_size=0.01),
            attack(x=x[:2])] == [1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("step_size", [8 / 255, 2 / 255, 0.8 / 255, 0.0005])
@pytest.mark.parametrize("fault", ["stands", "random", "descends"])
def test_an_attack_that_does_not_attack_is_not_used(fault, step_size, monkeypatch, capsys):
    """Its pixels are nearly those of the attack: a step is small beside them."""
    record_on_a_cpu(monkeypatch)
    model, x, y = SmallNet().eval().requires_grad_(False), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    real, signs = runtime.Recording.__call__, torch.randn(4, 3, 8, 8).sign()

    def call(self, x_adv, *others):
        moved = real(self, x_adv, *others) - x_adv
        return x_adv + {"stands": 0 * moved, "random": moved * signs, "descends": -moved}[fault]

    monkeypatch.setattr(runtime.Recording, "__call__", call)
    forward = runtime.RecordedPass(model, runtime.plain_pass(model), x)
    settings = dict(epsilon=8 / 255, step_size=step_size, num_steps=2, random_start="uniform")
    torch.manual_seed(0)
    expected = attacks.pgd(model, x, y, losses.cross_entropy, **settings)
    torch.manual_seed(0)
    assert torch.equal(attacks.pgd(forward, x, y, losses.cross_entropy, **settings), expected)
    assert "replayed it gives other values" in capsys.readouterr().err


def test_each_recording_leaves_its_own_gradients(monkeypatch):
    record_on_a_cpu(monkeypatch)
    model, x = SmallNet(), torch.rand(4, 3, 8, 8)
    forward = runtime.RecordedPass(model, runtime.plain_pass(model), x)

    def update(factor, x):
        model.zero_grad()
        loss = factor * forward(x).square().mean()
        loss.backward()
        return loss.detach()

    one, ten = (forward.recorded(functools.partial(update, factor)) for factor in (1, 10))
    with runtime.untouched(model):
        one(x)
        first = [p.grad.clone() for p in model.parameters()]
        ten(x)
        model.zero_grad()
        one(x)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), first, strict=True))
    ten(x)
    assert all(torch.allclose(p.grad, 10 * grad, atol=1e-5) for p, grad in zip(model.parameters(), first, strict=True))


def test_what_a_recording_returned_stays(monkeypatch):
    record_on_a_cpu(monkeypatch)
    model, x = SmallNet(), torch.rand(4, 3, 8, 8)
    forward = runtime.RecordedPass(model, runtime.plain_pass(model), x)
    one, several = forward.recorded(lambda x: 2 * x), forward.recorded(lambda x: (3 * x, None))
    first = one(x), *several(x)
    one(x + 1), several(x + 1)
    assert torch.equal(first[0], 2 * x) and torch.equal(first[1], 3 * x) and first[2] is None


def test_cudnn_times_its_algorithms_where_shapes_are_fixed_only(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime.pick_device("cuda")
    assert (cudnn.benchmark, cudnn.allow_tf32) == (True, False)
    for allowed in (True, False):
        with runtime.tf32_convolutions(allowed):
            with attacks._left_as_found(torch.device("cpu")):
                assert (cudnn.benchmark, cudnn.allow_tf32, cudnn.enabled) == (False, allowed, True)
            assert (cudnn.benchmark, cudnn.allow_tf32) == (True, allowed)
    assert (cudnn.benchmark, cudnn.allow_tf32) == (True, False)


@pytest.mark.parametrize("attack, flag, crafted_in", [
    (["pgd"], False, True), (["cw", "--kappas", "0"], False, False), (["square"], False, False),
    (["square"], True, True)], ids=str)
def test_tf32_crafts_and_never_counts(attack, flag, crafted_in, model_path, monkeypatch, capsys):
    """Nor crafts where one step decides; AutoAttack, here its cheapest part, by the flag alone."""
    argv = ["--model-path", str(model_path), "--num-images", "8", "--compile", "off", "--precision", "fp32",
            "--num-steps", "2", "--cw-steps", "2", "--attacks", *(["autoattack"] if attack == ["square"] else attack)]
    assert "--tf32: a CPU" in fails_in_one_line(eval_attacks.main, [*argv, "--tf32", "--device", "cpu"], capsys)
    parse, seen = eval_attacks.parse_args, {True: set(), False: set()}

    def with_tf32(argv):
        parser, args = parse(argv)
        args.tf32 = flag
        return parser, args

    monkeypatch.setattr(eval_attacks, "parse_args", with_tf32)
    monkeypatch.setattr(attacks, "COMPONENTS", {"apgd-ce": 102})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen[torch.is_grad_enabled()].add(torch.backends.cudnn.allow_tf32))
    try:
        row = eval_attacks.main(argv)["attacks"][-1]
    finally:
        hook.remove()
    assert seen[True] == {crafted_in} and (row["params"].get("tf32") is True) == flag
    assert False in seen[False] if flag else seen[False] == {False}  # APGD runs some passes without gradients, too
