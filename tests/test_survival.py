"""Real processes, really killed; and arguments that nobody would type."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import fails_in_one_line
from test_checkpoints import own_checkpoint
from test_train import TINY, without_times

import audit
import checkpoints
import eval_attacks
import pseudo_label
import train_cifar

# Checkpoints are written in small pieces with pauses between them, so that many kills fall into the middle of one.
SLOW_WRITER = """
import io, sys, time, torch
real = torch.save
def slow(state, file):
    memory = io.BytesIO()
    real(state, memory)
    content = memory.getvalue()
    for first in range(0, len(content), 1 + len(content) // 8):
        file.write(content[first : first + 1 + len(content) // 8])
        file.flush()
        time.sleep(0.02)
torch.save = slow
import train_cifar
train_cifar.main(sys.argv[1:])
"""
RUN = ["--defense", "mart", "--spat-alpha", "0.3", *TINY, "--save-minutes", "0"]


def start(arguments):
    return subprocess.Popen([sys.executable, "-c", SLOW_WRITER, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, cwd=pathlib.Path(train_cifar.__file__).parent,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_until_done(begin, out_dir, kills, seed):
    """Start, kill at a random moment once it has begun, resume, ... -> how often it was killed."""
    g, killed = random.Random(seed), 0
    while True:
        resumable = any((out_dir / name).exists() for name in ("last.pt", "last.prev.pt"))
        # killed before its first checkpoint, there is nothing to resume: the same command starts again
        process = start(["--resume", "--out-dir", str(out_dir)] if resumable else [*begin, "--out-dir", str(out_dir)])
        process.stdout.readline()  # the run has begun
        if killed < kills:
            time.sleep(g.uniform(0.1, 1.5))
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        status = process.wait()
        if status == 0:
            return killed
        assert status == -signal.SIGKILL
        killed += 1


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path, kills=25):
    torch.set_num_threads(1)
    begin = [*RUN, "--epochs", "3", "--limit-train", "960"]  # so many steps that it is not done before the last kill
    train_cifar.main([*begin, "--out-dir", str(tmp_path / "whole")])
    assert kill_until_done(begin, tmp_path / "cut", kills, seed=kills) == kills
    assert without_times(tmp_path / "cut/log.csv") == without_times(tmp_path / "whole/log.csv")
    for name in ("last.pt", "best.pt"):
        whole, cut = (checkpoints.load(tmp_path / run / name)["state_dict"] for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name
    assert not list((tmp_path / "cut").glob(".*.tmp"))


@pytest.mark.usefixtures("tiny_net")
def test_a_second_run_in_the_same_directory_is_refused_at_every_step(tmp_path, capsys, monkeypatch):
    """That the lock keeps other processes out too, and ends with its holder: test_checkpoints.py."""
    real, said = train_cifar.data.augment, []

    def meanwhile(*args):
        capsys.readouterr()
        said.append(fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", tmp_path], capsys))
        return real(*args)

    monkeypatch.setattr(train_cifar.data, "augment", meanwhile)
    train_cifar.main([*RUN, "--out-dir", str(tmp_path)])
    assert len(said) == 6 and all("another process" in line for line in said)


def before_it_has_the_lock(monkeypatch, happens):
    """happens() between the moment when a run of this process has read its directory and the one when it locks it."""
    real = train_cifar.data.load

    def load(*args, **settings):
        monkeypatch.setattr(train_cifar.data, "load", real)
        happens()
        return real(*args, **settings)

    monkeypatch.setattr(train_cifar.data, "load", load)


@pytest.mark.slow
def test_resume_goes_on_from_what_the_old_process_saved_last(tmp_path, monkeypatch):
    old, begun = start([*RUN, "--epochs", "50", "--out-dir", str(tmp_path)]), []
    old.stdout.readline()

    def old_one_saves_and_exits():
        before, deadline = checkpoints.load(tmp_path / "last.pt")["step"], time.time() + 60
        while checkpoints.load(tmp_path / "last.pt")["step"] <= before and time.time() < deadline:
            time.sleep(0.1)
        old.terminate()
        assert old.wait(timeout=60) == 128 + signal.SIGTERM

    try:
        while not (tmp_path / "last.pt").exists() and old.poll() is None:
            time.sleep(0.1)
        before_it_has_the_lock(monkeypatch, old_one_saves_and_exits)
        monkeypatch.setattr(train_cifar, "train", lambda args, state, *_: begun.append(state["step"]) or True)
        train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    finally:
        old.kill()
        old.wait()
    assert begun == [checkpoints.load(tmp_path / "last.pt")["step"]]


@pytest.mark.usefixtures("tiny_net")
def test_a_run_that_began_and_ended_meanwhile_is_not_overwritten(tmp_path, monkeypatch, capsys):
    argv, left = [*RUN, "--epochs", "1", "--out-dir", str(tmp_path)], {}

    def another_one_trains():
        train_cifar.main(argv)
        capsys.readouterr()
        left.update({file.name: file.read_bytes() for file in tmp_path.iterdir()})

    before_it_has_the_lock(monkeypatch, another_one_trains)
    assert "holds a run already" in fails_in_one_line(train_cifar.main, argv, capsys)
    assert "best.pt" in left and {file.name: file.read_bytes() for file in tmp_path.iterdir()} == left


TRAIN_FLAGS = ["--defense", "--spat-alpha", "--beta", "--dataset", "--arch", "--val-size", "--limit-train", "--epochs",
               "--batch-size", "--lr", "--lr-schedule", "--lr-milestones", "--momentum", "--weight-decay", "--epsilon",
               "--step-size", "--num-steps", "--random-start", "--precision", "--compile", "--device", "--seed",
               "--out-dir", "--data-dir", "--save-minutes", "--resume", "--recipe", "--aux-data", "--aux-fraction",
               "--nesterov", "--no-nesterov"]
EVAL_FLAGS = ["--model-path", "--attacks", "--alphas", "--epsilon", "--num-steps", "--cw-steps", "--step-size",
              "--random-start", "--num-images", "--batch-size", "--seed", "--dataset", "--data-dir", "--arch",
              "--precision", "--compile", "--device", "--json", "--protocol", "--kappas", "--epsilons", "--steps-sweep",
              "--restarts", "--any-step", "--pool", "--num-classes", "--normalize", "--save-examples", "--save-images"]
AUDIT_FLAGS = ["--model-path", "--num-images", "--seed", "--dataset", "--data-dir", "--arch", "--normalize", "--json",
               "--precision", "--compile", "--device", "--epsilon", "--batch-size", "--square-queries", "--autoattack",
               "--oracle", "--alphas"]
LABEL_FLAGS = ["--model-path", "--images", "--output", "--normalize", "--batch-size", "--device"]
VALUES = ["", " ", "0", "1", "-1", "0.3", "1.5", "8/255", "1/0", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 40,
          "mart", "trades", "digits", "cifar10", "nowhere", "wrn-16-2", "wrn-999-99", "resnet-18", "auto", "none", "-",
          "/dev/null", "/proc/1/x", "\0", "a\nb", "ε", "🙂" * 20, "--", "[1]", "True", "0x10", "1_000", "../..",
          "natural", "pgd-ls", "autoattack", "rst", "m.pt", "aux.npz", "0.5,0.5,0.5", "1,nan,1", "1,1,0"]


def test_any_command_line_ends_in_one_line(tmp_path, capsys, monkeypatch, fuzz_cases):
    """Random flags with random values: exit status 2 after one line, and nothing is written. What would be a valid
    run stops where the work would begin."""
    monkeypatch.chdir(tmp_path)

    def begin(*args, **settings):
        raise SystemExit(0)

    monkeypatch.setattr(train_cifar, "train", begin)
    monkeypatch.setattr(eval_attacks, "evaluate", begin)
    monkeypatch.setattr(audit.runtime, "forward_pass", begin)
    monkeypatch.setattr(pseudo_label.eval_attacks, "attacked_logits", begin)
    monkeypatch.setattr(train_cifar.pathlib.Path, "mkdir", begin)
    own_checkpoint(tmp_path / "m.pt", num_classes=10)
    np.savez(tmp_path / "aux.npz", data=np.zeros((3, 32, 32, 3), np.uint8), extrapolated_targets=np.arange(3))
    scripts = ((train_cifar.main, TRAIN_FLAGS, ["--dataset", "digits", "--defense"]),
               (eval_attacks.main, EVAL_FLAGS, ["--model-path", "m.pt"]),
               (audit.main, AUDIT_FLAGS, ["--model-path", "m.pt"]),
               (pseudo_label.main, LABEL_FLAGS, ["--model-path", "m.pt", "--images", "aux.npz", "--output", "o.npz"]))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    g, refused = random.Random(0), 0
    for case in range(fuzz_cases):
        main, flags, start = scripts[case % len(scripts)]
        argv = start + [g.choice(["mart", "madry", "standard"])] * (main is train_cifar.main)
        for flag in g.sample(flags, g.randint(1, 3)):
            argv += [flag, *g.choices(VALUES, k=g.choice([0, 1, 1, 1, 1, 2]))]
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        error = capsys.readouterr().err
        if exit_info.value.code not in (0, None):
            assert exit_info.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, (argv, error)
            refused += 1
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, argv
    assert fuzz_cases / 2 < refused < fuzz_cases  # both kinds occur
