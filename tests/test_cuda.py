"""What only a GPU can show: that compiled code, CUDA graphs, resuming and torchrun do there what they do on a CPU.

With DEVICE = "cpu" all but the one that runs out of memory run on a CPU too, in some minutes.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from test_distributed import job
from test_train import TINY, run_until, without_times

import attacks
import checkpoints
import eval_attacks
import losses
import models
import runtime
import train_cifar

DEVICE = "cuda"
LEVELS = ["on", "graphs"] if DEVICE == "cuda" else ["on"]
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="torch finds no CUDA device here")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles anew."""
    torch.compiler.reset()
    runtime.pick_device(DEVICE)


def five_steps(defense, level):
    """The weights, as one vector, after five training steps; in float64, where signs of gradients do not flip."""
    torch.manual_seed(0)
    model = models.build_model("wrn-10-1").to(DEVICE, torch.float64)
    args = train_cifar.with_defaults({"defense": defense, "arch": "wrn-10-1", "num_steps": 3, "batch_size": 16})
    x = torch.rand(16, 3, 32, 32, dtype=torch.float64).to(DEVICE, memory_format=torch.channels_last)
    y, eager = torch.randint(10, (16,)).to(DEVICE), runtime.plain_pass(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    forward = runtime.fast_pass(model, eager, x, level, strict=True)
    update = attacks.recorded(forward, functools.partial(train_cifar.forward_backward, model, forward, args=args))
    optimizer = train_cifar.build_optimizer(model, args)
    for _ in range(5):
        start = 0.001 * torch.randn(x.shape, dtype=torch.float64).to(DEVICE, memory_format=torch.channels_last)
        x_adv = train_cifar.inner_maximisation(model, forward, x, y, start, args)
        update(x, x_adv, y)
        optimizer.step()
    if level == "graphs":
        recordings = [made for made, _ in forward.made.values() if isinstance(made, runtime.Recording)]
        assert len(recordings) == (3 if defense == "trades" else 2)  # TRADES' target is the third
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("defense", ["madry", "trades", "mart"])
def test_five_compiled_steps_are_five_eager_steps(defense, level):
    eager, compiled = five_steps(defense, "off"), five_steps(defense, level)
    assert eager.abs().max() > 0.01
    assert (compiled - eager).norm() < 1e-3 * eager.norm()  # TRADES' target is float32


@pytest.mark.parametrize("level", LEVELS)
def test_compiled_evaluation_counts_as_eager_does(level, model_path):
    """Float32 rounds differently there, which may tip an image at the boundary, of 200 at most two."""
    rows = []
    for compiled in ("off", level):
        result = eval_attacks.main([
            "--model-path", str(model_path), "--num-images", "200", "--device", DEVICE, "--precision", "fp32",
            "--compile", compiled, "--attacks", "natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls", "--alphas", "0.3",
            "--num-steps", "5", "--cw-steps", "5"])
        assert result["compile"] == compiled
        rows.append([int(row["correct_mask"], 16) for row in result["attacks"]])
    assert len(rows[0]) == 7 and all((a ^ b).bit_count() <= 2 for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("level", ["off", *LEVELS])
def test_a_stopped_run_goes_on(level, tmp_path, monkeypatch):
    """To the same number of steps, and nearly the same log: some CUDA kernels add in a varying order."""
    argv = ["--defense", "mart", "--spat-alpha", "0.3", *TINY, "--device", DEVICE, "--compile", level,
            "--save-minutes", "0"]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    run_until(4, [*argv, "--out-dir", str(tmp_path / "cut")], monkeypatch)
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    whole, cut = (checkpoints.load(tmp_path / run / "last.pt") for run in ("whole", "cut"))
    assert cut["step"] == whole["step"] == 6 and cut["args"]["compile"] == whole["args"]["compile"] == level
    assert cut["on"] == [DEVICE, 1]
    for row, other in zip(*(without_times(tmp_path / f"{run}/log.csv") for run in ("whole", "cut")), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=0.05)


@pytest.mark.parametrize("level", LEVELS)
def test_ten_thousand_images_need_the_memory_of_the_first(level):
    """What is allocated is asked for its lowest values: torch's backward thread may give its last buffer back a moment
    after the call, but what leaks stays."""
    model, used = models.build_model("wrn-10-1").to(DEVICE).eval(), []
    images = torch.rand(250, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    y = torch.randint(10, (250,)).to(DEVICE)
    forward = runtime.fast_pass(model, runtime.plain_pass(model, "bf16"), images, level, strict=True)
    with models.frozen(model):
        for _ in range(40):
            attacks.pgd(forward, images, y, losses.cross_entropy, epsilon=8 / 255, step_size=2 / 255, num_steps=2)
            if DEVICE == "cuda":
                used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    if DEVICE == "cuda":
        (first, reserved_first), (last, reserved_last) = (zip(*part, strict=True) for part in (used[2:20], used[20:]))
        assert min(last) <= min(first) and max(reserved_last) <= max(reserved_first), used


DIGITS = ["--defense", "mart", "--spat-alpha", "0.3", "--dataset", "digits", "--epsilon", "0.01", "--num-steps", "2",
          "--epochs", "4", "--device", DEVICE]


def run_of(folder, *flags):
    """(the arguments, the log's rows) of the plain command line, for a task that is learnt in four epochs."""
    train_cifar.main([*DIGITS, *flags, "--out-dir", str(folder)])
    for name in ("last.pt", "best.pt"):
        assert all(v.isfinite().all() for v in checkpoints.load(folder / name)["state_dict"].values()), name
    rows = [{key: float(value) for key, value in row.items()} for row in without_times(folder / "log.csv")]
    return json.loads((folder / "args.json").read_text()), rows


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("plain"), "--precision", "fp32", "--compile", "off")[1]


@pytest.mark.parametrize("flags", [[], *(["--precision", "bf16", "--compile", level] for level in LEVELS)],
                         ids=lambda flags: " ".join(flags) or "plain")
def test_a_run_in_bf16_learns_as_eager_float32_does(flags, plain_rows, tmp_path, capsys):
    """The first epoch tells: later ones of two equal runs that round differently are up to 37 % apart in their loss,
    as ten runs on a CPU were, by 0.6 % and 0.017 in the first. That steps are equal is shown above."""
    args, rows = run_of(tmp_path, *flags)
    printed = capsys.readouterr().out
    assert args["precision"] == "bf16" or DEVICE == "cpu" and not flags
    assert args["compile"] == flags[-1] if flags else args["compile"] in ("off", *LEVELS)
    assert f"precision {args['precision']}: " in printed and f"compile {args['compile']}: " in printed
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"] and rows[-1]["val_natural_accuracy"] > 0.6
    assert rows[0]["train_loss"] == pytest.approx(plain_rows[0]["train_loss"], rel=0.03)
    assert rows[0]["train_robust_accuracy"] == pytest.approx(plain_rows[0]["train_robust_accuracy"], abs=0.05)


def test_after_a_recording_that_fails_another_can_be_made(capsys):
    model, x = models.build_model("wrn-10-1").to(DEVICE).eval(), torch.rand(8, 3, 32, 32, device=DEVICE)
    forward = runtime.fast_pass(model, runtime.plain_pass(model), x, LEVELS[-1])
    if DEVICE == "cuda":
        assert forward.recorded(lambda x: x * x.sum().item())(x).equal(x * x.sum().item())  # it waits for the GPU
        assert "a step could not be recorded" in capsys.readouterr().err
    good = attacks.constant_logits(forward, x)
    assert torch.allclose(attacks.constant_logits(forward, x), good)
    with models.frozen(model):
        assert torch.allclose(good, model(x), atol=1e-3)


def test_out_of_memory_ends_in_one_line(tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(SystemExit) as exit_info:
            train_cifar.main(["--defense", "madry", *TINY, "--device", DEVICE, "--out-dir", str(tmp_path)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert exit_info.value.code.startswith("train_cifar.py: CUDA out of memory")
    assert "\n" not in exit_info.value.code


def test_one_process_of_torchrun_with_nccl(tmp_path):
    script = pathlib.Path(__file__).parent.parent / "train_cifar.py"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", script,
                           "--defense", "trades", *TINY, "--device", DEVICE, "--out-dir", tmp_path / "run"],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = checkpoints.load(tmp_path / "run/last.pt")
    assert last["epoch"] == 2 and last["on"] == [DEVICE, 1]


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="this takes two GPUs")
@pytest.mark.parametrize("level", ["off", *LEVELS])
def test_two_processes_of_torchrun_with_nccl_equal_one(level, tmp_path):
    """Of the same global batch, for a net without batch norm, whose statistics are of each process's part."""
    weights = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        status, output = job(processes, "norm-free", folder, "--defense", "mart", "--spat-alpha", "0.3", *TINY,
                             "--device", DEVICE, "--compile", level, "--out-dir", folder / "run")
        assert status == 0, output
        assert checkpoints.load(folder / "run/last.pt")["on"] == [DEVICE, processes]
        for rank in range(processes):
            weights[processes, rank], before = (torch.cat([v.flatten().cpu() for v in torch.load(
                folder / f"rank{rank}-{epoch}.pt", weights_only=True).values()]) for epoch in (1, 0))
    one, two = weights[1, 0], weights[2, 0]
    assert torch.equal(two, weights[2, 1])
    assert (two - one).norm() < 1e-3 * (one - before).norm()  # of the second epoch's way; a sign or two may flip
