"""What the flags --precision, --compile and --device come to, and that nobody is left without a way to run."""

import argparse
import contextlib
import functools

import numpy as np
import pytest
import torch
from helpers import SmallNet, fails_in_one_line, like_cuda_graphs
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
    assert precision in ("fp32", "bf16") and "x the speed" in why
    assert runtime.pick_precision("fp32", torch.device("cpu"))[0] == "fp32"


@pytest.mark.parametrize("ratio, expected, says", [(0.00417, "fp32", "at 0.0042x"), (1.27, "fp32", "at 1.3x"),
                                                   (12.3, "bf16", "at 12x")])
def test_the_reason_has_two_digits_however_slow_bf16_is(monkeypatch, ratio, expected, says):
    taken = iter((ratio, 1.0))
    monkeypatch.setattr(runtime, "shortest_seconds", lambda *_: next(taken))
    precision, why = runtime.pick_precision("auto", torch.device("cpu"))
    assert precision == expected and f" {says} the speed" in why


def test_bf16_forward_returns_nearly_the_same_logits():
    model, x = models.build_model("wrn-10-1").eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        half, full = runtime.plain_pass(model, "bf16")(x), runtime.plain_pass(model)(x)
    assert half.dtype == torch.bfloat16 and torch.equal(full, model(x).detach())
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_compile_auto_is_on_for_a_long_run_only_and_says_why():
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    for passes, expected, says in ((3, "off", " seconds, too little"), (10**8, "on", " days, take a GPU"),
                                   (10**10, "on", " months, take a GPU")):
        chosen, why = runtime.pick_compile("auto", model, model, x, passes, "take a GPU")
        assert chosen == expected and says in why
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fails_in", ["eval", "train"])
def test_a_compiler_that_fails_leaves_the_eager_model(fails_in, monkeypatch, capsys):
    """Also one that fails in the second graph only, that of the training step."""
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)

    def broken(function, **settings):
        def call(x):
            if model.training == (fails_in == "train"):
                raise RuntimeError("no compiler\nand much more")
            return function(x)
        return call

    monkeypatch.setattr(torch, "compile", broken)
    args = argparse.Namespace(precision="fp32", compile="on")
    forward = runtime.forward_pass(args, model, x, passes=1, train_passes=2)
    assert capsys.readouterr().out.endswith("compile off: torch.compile failed (RuntimeError): no compiler\n")
    assert args.compile == "off"  # what the checkpoint and the JSON are to say
    assert forward.__name__ == "forward"  # plain_pass's, and not call
    with torch.no_grad(), models.frozen(model):
        assert torch.equal(forward(x), model(x))
    args.compile = "on"  # an evaluation does not try what it does not do
    runtime.forward_pass(args, model, x, passes=1)
    assert args.compile == ("on" if fails_in == "train" else "off")


@pytest.mark.parametrize("broken, wanted, came_of_it, tried", [
    ((), "graphs", "graphs", ["graphs"]), (("graphs",), "graphs", "on", ["graphs", "on"]),
    (("graphs", "on"), "graphs", "off", ["graphs", "on"]), ((), "on", "on", ["on"]), ((), "off", "off", [])])
def test_cuda_graphs_fall_back_to_compiled_and_that_to_eager(broken, wanted, came_of_it, tried, monkeypatch):
    asked = []

    def compile_and_try(model, plain, x, level, train_passes):
        asked.append(level)
        if level in broken:
            raise RuntimeError(f"no {level}")
        return level

    monkeypatch.setattr(runtime, "compile_and_try", compile_and_try)
    forward, level, words = runtime.fast_pass(None, "eager", argparse.Namespace(is_cuda=True), wanted)
    assert (forward, level) == ("eager" if came_of_it == "off" else came_of_it, came_of_it)
    said = [f"torch.compile failed (RuntimeError): no {one}" for one in broken]
    assert asked == tried and words == said + ["0 s to compile and try"] * (came_of_it != "off")


def test_cuda_graphs_on_a_cpu_are_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, mode, **_: {"default": lambda x: function(x)}[mode])
    args = argparse.Namespace(precision="fp32", compile="graphs")
    runtime.forward_pass(args, models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32), passes=1)
    assert args.compile == "on" and "compile on: no CUDA graphs on a CPU; " in capsys.readouterr().out


def test_what_fails_in_one_process_is_used_in_none(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x))
    monkeypatch.setattr(runtime, "any_process", lambda *flags: [True])
    model, x = models.build_model("wrn-10-1"), torch.rand(2, 3, 32, 32)
    eager = runtime.plain_pass(model)
    assert runtime.fast_pass(model, eager, x, "on") == (eager, "off", ["torch.compile failed in another process"])


@pytest.mark.parametrize("fails_at", [None, 1, 5])
def test_a_rehearsal_leaves_no_trace(fails_at):
    """Not even one that fails half way, and whatever the model draws; it runs what it says."""
    torch.manual_seed(0)
    model, x, seen = SmallNet(), torch.rand(4, 3, 8, 8), []
    model.head.eval()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)

    def state():
        tensors = [*model.buffers(), *model.parameters(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        return [t.clone() for t in tensors], [m.training for m in model.modules()], [
            p.requires_grad for p in model.parameters()], x.requires_grad

    def forward(batch):
        seen.append((model.training, batch.requires_grad))
        if len(seen) == fails_at:
            raise RuntimeError
        return model(batch + 0 * torch.rand_like(batch))

    tensors, *flags = state()
    with pytest.raises(RuntimeError) if fails_at else contextlib.nullcontext():
        runtime.rehearse(model, forward, x, rounds=2, train_passes=2)
    tensors_now, *flags_now = state()
    assert flags_now == flags and all(torch.equal(a, b) for a, b in zip(tensors_now, tensors, strict=True))
    assert seen == ([(False, True), (True, False), (True, False)] * 2)[:fails_at]


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
    forward = runtime.plain_pass(fast)
    if compiled == "on":
        forward = runtime.compile_and_try(fast, forward, x, "on")
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
        found = [runtime.fast_pass(model, runtime.plain_pass(model), torch.rand(size, 3, 8, 8), "on", train_passes=1)
                 for size in (2, 3, 4, 5)]
    assert [level for _, level, _ in found] == ["on"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["standard"], ["madry"], ["trades"], ["mart", "--spat-alpha", "0.3"]], ids=" ".join)
def test_training_keeps_no_result_that_a_cuda_graph_overwrites(flags, tmp_path, monkeypatch):
    """To the bit the eager run: so the rehearsal leaves no trace either."""
    argv = ["--defense", *flags, *TINY, "--epochs", "1"]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "off")])
    monkeypatch.setattr(torch, "compile", like_cuda_graphs)
    train_cifar.main([*argv, "--compile", "on", "--out-dir", str(tmp_path / "on")])
    on, off = (checkpoints.load(tmp_path / level / "last.pt") for level in ("on", "off"))
    assert (on["args"]["compile"], off["args"]["compile"]) == ("on", "off")
    assert all(torch.equal(on["state_dict"][key], off["state_dict"][key]) for key in off["state_dict"])
    assert without_times(tmp_path / "on/log.csv") == without_times(tmp_path / "off/log.csv")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--restarts", "2", "--any-step"], ["--pool"]])
def test_evaluation_keeps_no_result_that_a_cuda_graph_overwrites(flags, model_path, tmp_path, monkeypatch):
    """A row of bf16 may have one of float32 in between: the margin with κ 0."""
    argv = ["--model-path", model_path, "--attacks", "natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls",
            "--alphas", 0, 1, "--kappas", 50, 0, "--num-images", 12, "--batch-size", 8, "--num-steps", 2,
            "--cw-steps", 2, "--precision", "fp32", "--compile", "on", "--save-examples", tmp_path / "e.npz",
            "--save-images", *flags]
    found = []
    for compiler in (lambda function, **_: lambda x: function(x), like_cuda_graphs):
        monkeypatch.setattr(torch, "compile", compiler)
        assert eval_attacks.main(list(map(str, argv)))["compile"] == "on"
        with np.load(tmp_path / "e.npz") as file:
            found.append({name: file[name] for name in file})
    assert len(found[0]) == 1 + 3 * 8 and all(np.array_equal(found[1][name], array) for name, array in found[0].items())
    assert np.abs(found[0]["images/FGSM"] - found[0]["images/Natural"]).max() > 0.01


def test_cudnn_times_its_algorithms_where_shapes_are_fixed_only(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime.pick_device("cuda")
    assert (cudnn.benchmark, cudnn.allow_tf32) == (True, False)
    for allowed in (True, False):
        with runtime.tf32_convolutions(allowed):
            with attacks._left_as_found(None, torch.device("cpu")):
                assert (cudnn.benchmark, cudnn.allow_tf32, cudnn.enabled) == (False, allowed, True)
            assert (cudnn.benchmark, cudnn.allow_tf32) == (True, allowed)
    assert (cudnn.benchmark, cudnn.allow_tf32) == (True, False)


@pytest.mark.parametrize("attack, crafted_in", [(["pgd"], True), (["cw", "--kappas", "0"], False)])
def test_tf32_crafts_and_never_counts(attack, crafted_in, model_path, monkeypatch, capsys):
    """Nor crafts where one step decides."""
    argv = ["--model-path", str(model_path), "--num-images", "8", "--compile", "off", "--precision", "fp32",
            "--num-steps", "2", "--cw-steps", "2", "--attacks", *attack]
    assert "--tf32: a CPU" in fails_in_one_line(eval_attacks.main, [*argv, "--tf32", "--device", "cpu"], capsys)
    parse, seen = eval_attacks.parse_args, {True: set(), False: set()}

    def with_tf32(argv):
        parser, args = parse(argv)
        args.tf32 = True
        return parser, args

    monkeypatch.setattr(eval_attacks, "parse_args", with_tf32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen[torch.is_grad_enabled()].add(torch.backends.cudnn.allow_tf32))
    try:
        assert eval_attacks.main(argv)["tf32"] is True
    finally:
        hook.remove()
    assert seen == {True: {crafted_in}, False: {False}}
