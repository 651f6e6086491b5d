"""Two processes on two CPU cores (gloo): what torchrun does with nccl on GPUs."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from test_train import TINY, without_times

import checkpoints
import runtime
import train_cifar

JOB = pathlib.Path(__file__).parent / "distributed_job.py"
RUN = ["--defense", "mart", "--spat-alpha", "0.3", *TINY]


def job(processes, *arguments):
    """Run it to its end -> (exit status, what it printed)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, JOB, *map(str, arguments)], capture_output=True, text=True,
                          timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_weights_and_buffers_are_equal_on_all_processes(tmp_path):
    status, output = job(2, "observe", tmp_path, *RUN, "--out-dir", tmp_path / "run")
    assert status == 0, output
    assert output.count("eval_attacks.py --model-path") == 1 and output.count("images to train on") == 1
    for epoch in (0, 1):
        a, b = (torch.load(tmp_path / f"rank{rank}-{epoch}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any("running_var" in key for key in a)
    last = checkpoints.load(tmp_path / "run/last.pt")
    assert last["epoch"] == 2 and last["on"] == ["cpu", 2]


@pytest.mark.slow
def test_without_batch_norm_two_processes_equal_one(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        status, output = job(processes, "norm-free", tmp_path / str(processes), *RUN, "--out-dir",
                             tmp_path / f"run{processes}")
        assert status == 0, output
    one, two = (torch.load(tmp_path / f"{n}/rank0-1.pt", weights_only=True) for n in (1, 2))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
    for row, other in zip(*(without_times(tmp_path / f"run{n}/log.csv") for n in (1, 2)), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, abs=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_it_resumes(tmp_path):
    argv = ["--save-minutes", "0", "--out-dir", tmp_path / "run"]
    start = time.time()
    status, output = job(2, "die", tmp_path, *RUN, *argv)
    assert status != 0 and time.time() - start < 120
    assert checkpoints.load(tmp_path / "run/last.pt")["step"] == 4  # in the middle of the second epoch
    status, output = job(1, "observe", tmp_path, "--resume", *argv)
    assert status == 0 and "no longer equal to the bit" in output, output
    assert checkpoints.load(tmp_path / "run/last.pt")["epoch"] == 2
    first, second = without_times(tmp_path / "run/log.csv")  # the running sums do not depend on who added to them
    assert float(second["train_loss"]) == pytest.approx(float(first["train_loss"]), rel=0.15)


@pytest.mark.slow
def test_a_signal_to_one_ends_all_within_ten_steps_and_saves(tmp_path):
    status, output = job(2, "terminate", tmp_path, *RUN, "--limit-train", "320", "--epochs", "1", "--out-dir",
                         tmp_path / "run")
    assert status != 0 and "stopped and saved" in output, output
    assert checkpoints.load(tmp_path / "run/last.pt")["step"] == 10  # of 20; the signal came in the fifth


@pytest.mark.slow
def test_all_processes_go_on_from_what_stood_there_once_it_was_locked(tmp_path):
    train_cifar.main([*RUN, "--out-dir", str(tmp_path / "run")])
    (tmp_path / "run/last.pt").rename(tmp_path / "newer.pt")
    (tmp_path / "run/last.prev.pt").rename(tmp_path / "run/last.pt")
    status, output = job(2, "overtaken", tmp_path, "--resume", "--out-dir", tmp_path / "run")
    assert status == 0, output
    assert [(tmp_path / f"step{rank}").read_text() for rank in (0, 1)] == ["6", "6"]  # 3 in the older file


@pytest.mark.slow
def test_all_processes_end_where_another_holds_the_lock(tmp_path):
    start = time.time()
    with runtime.run_lock(tmp_path / "run"):
        status, output = job(2, "observe", tmp_path, *RUN, "--out-dir", tmp_path / "run")
    assert status != 0 and "another process is training there" in output and time.time() - start < 120, output
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_compiled_pass_changes_nothing_and_is_used_by_all_or_none(tmp_path):
    """All or none: of two processes the one that compiled would do other arithmetic."""
    weights, said = {}, {}
    for mode, level in (("observe", "off"), ("traced", "on"), ("half-compiled", "auto")):
        (tmp_path / mode).mkdir()
        status, said[mode] = job(2, mode, tmp_path / mode, *RUN, "--epochs", "1", "--compile", level, "--out-dir",
                                 tmp_path / mode / "run")
        assert status == 0, said[mode]
        weights[mode] = torch.load(tmp_path / mode / "rank0-0.pt", weights_only=True)
        for name, tensor in weights["observe"].items():
            assert torch.equal(weights[mode][name], tensor), (mode, name)
    assert "compile on: as asked" in said["traced"]
    assert "--compile on failed, in another process; going on with --compile off" in said["half-compiled"]
    status, output = job(2, "half-compiled", tmp_path, *RUN, "--compile", "on", "--out-dir", tmp_path / "asked")
    assert status == 1 and "--compile on failed, in another process; no checkpoint was written yet" in output


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    status, output = job(2, "observe", tmp_path, *RUN, "--batch-size", "15", "--out-dir", tmp_path / "run")
    assert status != 0 and "cannot be split evenly over 2 processes" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluation_by_two_processes_counts_the_same(tmp_path):
    """37 images over two processes, with an odd batch size: the same outcome for every image."""
    status, output = job(1, "observe", tmp_path, *RUN, "--epochs", "1", "--out-dir", tmp_path / "run")
    assert status == 0, output
    argv = ["--model-path", tmp_path / "run/best.pt", "--num-images", "37", "--num-steps", "3", "--cw-steps", "2",
            "--precision", "fp32", "--batch-size", "7"]
    results = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
        json_path = tmp_path / f"{processes}.json"
        subprocess.run([sys.executable, *launcher, JOB.parent.parent / "eval_attacks.py", *argv, "--json", json_path],
                       check=True, capture_output=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"})
        results.append([(row["name"], row["correct_mask"]) for row in json.loads(json_path.read_text())["attacks"]])
    assert results[0] == results[1] and len(results[0]) == 5
