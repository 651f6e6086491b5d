"""What only a GPU can show: that compiled code, CUDA graphs, resuming and torchrun do there what they do on a CPU.

Written where no GPU was at hand; on a CPU the bodies of the first four were run with DEVICE = "cpu".
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
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
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Where torch cannot record a CUDA graph it says so by failing; each test compiles anew."""
    torch.compiler.reset()
    runtime.pick_device(DEVICE)
    with torch._inductor.config.patch("triton.cudagraph_or_error", True):
        yield


def five_steps(defense, level):
    """The weights, as one vector, after five training steps; in float64, where signs of gradients do not flip."""
    torch.manual_seed(0)
    model = models.build_model("wrn-10-1").to(DEVICE, torch.float64)
    args = train_cifar.with_defaults({"defense": defense, "arch": "wrn-10-1", "num_steps": 3, "batch_size": 16})
    x = torch.rand(16, 3, 32, 32, dtype=torch.float64).to(DEVICE, memory_format=torch.channels_last)
    y, eager = torch.randint(10, (16,)).to(DEVICE), runtime.plain_pass(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    forward, came_of_it, words = runtime.fast_pass(model, eager, x, level, 1 + (defense != "madry"))
    assert came_of_it == level, words
    optimizer = train_cifar.build_optimizer(model, args)
    for _ in range(5):
        start = 0.001 * torch.randn(x.shape, dtype=torch.float64).to(DEVICE, memory_format=torch.channels_last)
        x_adv = train_cifar.inner_maximisation(model, forward, x, y, start, args)
        train_cifar.forward_backward(model, forward, x, x_adv, y, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
    model, used = models.build_model("wrn-10-1").to(DEVICE).eval(), []
    images = torch.rand(250, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    y = torch.randint(10, (250,)).to(DEVICE)
    forward, came_of_it, words = runtime.fast_pass(model, runtime.plain_pass(model, "bf16"), images, level)
    assert came_of_it == level, words
    with models.frozen(model):
        for _ in range(40):
            attacks.pgd(forward, images, y, losses.cross_entropy, epsilon=8 / 255, step_size=2 / 255, num_steps=2)
            if DEVICE == "cuda":
                used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(used[2:])) <= 1, used


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
