"""The trainer: defaults, schedules, bad input, a run end to end, and resume."""

import argparse
import csv
import json
import math
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import torch
from helpers import digits_folder, fails_in_one_line, tiny_model

import attacks
import checkpoints
import data
import eval_attacks
import losses
import models
import runtime
import train_cifar

TINY = ["--dataset", "digits", "--limit-train", "48", "--val-size", "16", "--batch-size", "16", "--num-steps", "2",
        "--epochs", "2", "--precision", "fp32", "--compile", "off"]


def arguments(*argv):
    return train_cifar.with_defaults(train_cifar.parse_args(argv)[1])


def test_defaults_are_the_papers():
    args = arguments("--defense", "mart", "--spat-alpha", "0.3")
    expected = dict(dataset="cifar10", arch="wrn-34-10", epochs=90, batch_size=128, lr=0.1, momentum=0.9,
                    nesterov=False, weight_decay=7e-4, lr_schedule="step", lr_milestones=[75, 90], epsilon="8/255",
                    step_size="2/255", num_steps=10, random_start="gaussian", beta=5.0, spat_alpha=0.3, seed=1,
                    out_dir="runs/cifar10-wrn-34-10-mart-spat0.3-s1")
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize("argv, expected", [
    (["--defense", "trades"], dict(beta=6.0, spat_alpha=None, weight_decay=7e-4)),
    (["--defense", "trades", "--dataset", "mart"], dict(beta=6.0)),  # a folder of that name
    (["--defense", "mart", "--batch-size", "1"], dict(batch_size=1)),
    (["--defense", "trades", "--dataset", "cifar100"], dict(weight_decay=2e-4)),
    (["--defense", "madry", "--dataset", "cifar100"], dict(weight_decay=2e-4, beta=None)),
    (["--defense", "mart", "--dataset", "cifar100"], dict(weight_decay=7e-4)),
    (["--defense", "madry", "--epochs", "30"], dict(lr_milestones=[25, 30])),
    (["--defense", "madry", "--epsilon", "0.031"], dict(epsilon="0.031", step_size="31/4000")),
    (["--defense", "madry", "--dataset", "digits"], dict(epsilon=data.EPSILON_DIGITS, arch="wrn-10-1")),
    (["--defense", "madry", "--dataset", "digits", "--epsilon", "0.2", "--arch", "resnet-18"],
     dict(epsilon="0.2", arch="resnet-18")),
])
def test_defaults_by_data_set_and_defense(argv, expected):
    args = arguments(*argv)
    assert {key: getattr(args, key) for key in expected} == expected


def test_step_schedule_at_its_boundaries():
    args = arguments("--defense", "mart")
    rates = {epoch: train_cifar.learning_rate(args, epoch, 0.0) for epoch in (1, 74, 75, 89, 90)}
    assert rates == pytest.approx({1: 0.1, 74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001})


@pytest.mark.parametrize("epochs, expected", [(1, [1.0]), (2, [1.0, 0.1]), (4, [1.0, 1.0, 1.0, 0.1]),
                                              (6, [1.0, 1.0, 1.0, 1.0, 0.1, 0.01])])
def test_a_short_run_starts_at_the_full_rate(epochs, expected):
    args = arguments("--defense", "mart", "--epochs", str(epochs), "--lr", "1")
    assert [train_cifar.learning_rate(args, epoch, 0.0) for epoch in range(1, epochs + 1)] == expected


def test_cosine_schedule_is_torchs():
    args = arguments("--defense", "mart", "--lr-schedule", "cosine", "--epochs", "20")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(1, 21):
        assert train_cifar.learning_rate(args, epoch, 0.0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_onecycle_rises_to_the_peak_and_falls_to_zero():
    args = arguments("--defense", "mart", "--lr-schedule", "onecycle")
    rates = [train_cifar.learning_rate(args, 1, k / 1000) for k in range(1001)]
    assert rates[0] == pytest.approx(0.004) and max(rates) == rates[300] == pytest.approx(0.1)
    assert rates[:301] == sorted(rates[:301]) and rates[300:] == sorted(rates[300:], reverse=True)
    assert rates[650] == pytest.approx(0.05) and rates[1000] == pytest.approx(0, abs=1e-12)


BAD = {  # name: (arguments, what the one line says)
    "no defense": ([], "--defense is required"),
    "unknown defense": (["--defense", "fat"], "--defense is required: standard, madry, trades, mart"),
    "unknown data": (["--defense", "mart", "--dataset", "mnist"], "unknown data set 'mnist'"),
    "bad arch": (["--defense", "mart", "--arch", "wrn-33-10"], "unknown architecture"),
    "alpha above 1": (["--defense", "mart", "--spat-alpha", "1.1"], "'1.1' is not a number in [0, 1]"),
    "alpha below 0": (["--defense", "mart", "--spat-alpha=-0.1"], "'-0.1' is not a number in [0, 1]"),
    "epsilon below all floats": (["--defense", "mart", "--epsilon", "1e-400"], "'1e-400' is not a fraction or decimal"),
    "alpha nan": (["--defense", "mart", "--spat-alpha", "nan"], "'nan' is not a number in [0, 1]"),
    "alpha for standard": (["--defense", "standard", "--spat-alpha", "0.3"], "standard training has no attack"),
    "early stop for standard": (["--defense", "standard", "--early-stop", "0"], "standard training has no attack"),
    "beta for madry": (["--defense", "madry", "--beta", "6"], "madry has no KL term"),
    "kl without start": (["--defense", "trades", "--random-start", "none"], "the attack would not move"),
    "epsilon in pixels": (["--defense", "mart", "--epsilon", "8"], "'8' is not a fraction"),
    "epsilon negative": (["--defense", "mart", "--epsilon=-1"], "'-1' is not a fraction"),
    "epsilon zero": (["--defense", "mart", "--epsilon", "0"], "'0' is not a fraction"),
    "epsilon by zero": (["--defense", "mart", "--epsilon", "8/0"], "'8/0' is not a fraction"),
    "epsilon a word": (["--defense", "mart", "--epsilon", "big"], "'big' is not a fraction"),
    "no steps": (["--defense", "mart", "--num-steps", "0"], "'0' is not an integer above 0"),
    "half a step": (["--defense", "mart", "--num-steps", "2.5"], "'2.5' is not an integer above 0"),
    "no epochs": (["--defense", "mart", "--epochs", "0"], "'0' is not an integer above 0"),
    "milestones swapped": (["--defense", "mart", "--lr-milestones", "90", "75"], "90 75 are out of order"),
    "milestones of cosine": (["--defense", "mart", "--lr-schedule", "cosine", "--lr-milestones", "75", "90"],
                             "--lr-schedule cosine has none"),
    "lr infinite": (["--defense", "mart", "--lr", "inf"], "'inf' is not a finite number above 0"),
    "nesterov alone": (["--defense", "mart", "--nesterov", "--momentum", "0"], "--nesterov needs a --momentum"),
    "abbreviation": (["--defense", "mart", "--epoch", "3"], "unrecognized arguments: --epoch 3"),
    "no run to resume": (["--defense", "mart", "--resume"], "wrn-34-10-mart-s1 holds no run"),
    "no folder to resume": (["--resume", "--out-dir", "nowhere"], "nowhere holds no run"),
    "spat as a defense": (["--defense", "spat"], "--defense mart --spat-alpha 0.3, say"),
    "an underscore": (["--defense", "mart", "--batch_size", "64"], "did you mean --batch-size?"),
    "no hyphen": (["--defense", "mart", "--arch", "resnet18"], "did you mean resnet-18?"),
    "empty folder": (["--defense", "mart", "--dataset", "digits", "--out-dir", ""], "--out-dir: an empty name"),
    "resumed without a folder": (["--resume", "--out-dir", ""], "--out-dir: an empty name"),
    "too many held out": (["--defense", "mart", "--dataset", "digits", "--val-size", "1397"],
                          "--val-size 1397: 1397 training images are too few"),
    "limit above the set": (["--defense", "mart", "--dataset", "digits", "--limit-train", "5000"], "train on 5000"),
    "no cifar": (["--defense", "mart", "--data-dir", "cut"], "is incomplete or damaged"),
    "out-dir in a file": (["--defense", "mart", "--dataset", "digits",
                           "--out-dir", "cut/cifar-10-batches-py/test_batch/a"], "Not a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut/cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "cut/cifar-10-batches-py/test_batch").write_bytes(b"cut")
    argv, message = BAD[name]
    assert message in fails_in_one_line(train_cifar.main, argv, capsys)
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == [
        "cut", "cut/cifar-10-batches-py", "cut/cifar-10-batches-py/test_batch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device(tmp_path, capsys):
    argv = ["--defense", "mart", "--dataset", "digits", "--device", "cuda", "--out-dir", tmp_path / "run"]
    assert "CUDA" in fails_in_one_line(train_cifar.main, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("defense", [
    ["standard"], ["madry"], ["trades"], ["mart"], ["madry", "--spat-alpha", "0.2"], ["trades", "--spat-alpha", "0.1"],
    ["mart", "--spat-alpha", "0.3"], ["trades", "--spat-alpha", "0"],
])
def test_every_defense_trains(defense, tmp_path, request):
    if defense not in (["standard"], ["madry"]):
        request.getfixturevalue("no_curves")  # they show the same columns as Madry's
    train_cifar.main(["--defense", *defense, *TINY, "--out-dir", str(tmp_path)])
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    adversarial, has_alpha = defense[0] != "standard", defense not in (["standard"], ["trades"])
    for row in rows:
        assert math.isfinite(float(row["train_loss"])) and 0 <= float(row["val_robust_accuracy"]) <= 1
        assert bool(row["share_made_easier"]) == adversarial == bool(row["train_robust_accuracy"])
        assert bool(row["share_p_y_above_1_minus_alpha"]) == has_alpha
        assert float(row["images_per_s"]) > 0 and float(row["val_robust_loss"]) >= float(row["val_natural_loss"])
    args = json.loads((tmp_path / "args.json").read_text())
    assert args["defense"] == defense[0] and args["epsilon"] == data.EPSILON_DIGITS
    assert {f.name for f in tmp_path.iterdir()} == {
        ".lock", "args.json", "log.csv", "curves.png", "best.pt", "last.pt", "last.prev.pt"}
    best, last = checkpoints.load_model(tmp_path / "best.pt")[1], checkpoints.load_model(tmp_path / "last.pt")[1]
    scores = [float(row["val_robust_accuracy" if adversarial else "val_natural_accuracy"]) for row in rows]
    assert last["epoch"] == 2 and best["epoch"] == max(k for k, v in enumerate(scores, start=1) if v == max(scores))


@pytest.mark.usefixtures("tiny_net")
def test_the_attack_uses_the_objective_that_alpha_asks_for(tmp_path, monkeypatch):
    """--spat-alpha replaces the inner objective and touches nothing else."""
    seen = set()
    real = train_cifar.attacks.pgd

    def spy(model, x, target, objective, **settings):
        if settings["num_steps"] == 2:  # training; validation runs 20
            logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
            y = torch.tensor([1, 2, 3, 4])
            seen.add(tuple(objective(logits, logits.softmax(1) if target.ndim == 2 else y).tolist()))
            seen.add(settings["epsilon"])
        return real(model, x, target, objective, **settings)

    monkeypatch.setattr(train_cifar.attacks, "pgd", spy)
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1, 2, 3, 4])
    for flags, value in (
        (["trades"], losses.kl_divergence(logits, logits.softmax(1))),
        (["trades", "--spat-alpha", "0.1"], losses.lsce(logits, y, 0.1)),
        (["trades", "--spat-alpha", "0"], losses.cross_entropy(logits, y)),
        (["mart"], losses.cross_entropy(logits, y)),
        (["mart", "--spat-alpha", "0.3"], losses.lsce(logits, y, 0.3)),
    ):
        seen.clear()
        train_cifar.main(["--defense", *flags, *TINY, "--epochs", "1", "--out-dir", str(tmp_path / "-".join(flags))])
        assert seen == {tuple(value.tolist()), float(data.EPSILON_DIGITS)}


def test_trades_target_is_of_the_callable_that_is_attacked(small_net, images):
    """Here one that rounds: against unrounded probabilities the first steps follow the rounding (other signs)."""
    x, args = images[0], arguments("--defense", "trades")
    start = attacks.start_perturbation("gaussian", x, 0.1, torch.Generator().manual_seed(0))
    settings = dict(epsilon=8 / 255, step_size=2 / 255, num_steps=10, random_start=start)

    def rounding(x):
        return small_net(x).bfloat16()

    x_adv = train_cifar.inner_maximisation(small_net, rounding, x, None, start, args)
    with models.frozen(small_net):
        same, other = (attacks.pgd(rounding, x, target(x).float().softmax(1), losses.kl_divergence, **settings)
                       for target in (rounding, small_net))
    assert torch.equal(x_adv, same) and not torch.equal(x_adv, other)


@pytest.mark.usefixtures("tiny_net")
def test_no_held_out_images_no_best(tmp_path):
    train_cifar.main(["--defense", "madry", *TINY, "--val-size", "0", "--out-dir", str(tmp_path)])
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
    assert all(row["val_robust_accuracy"] == "" for row in csv.DictReader(open(tmp_path / "log.csv")))


@pytest.mark.usefixtures("tiny_net")
def test_a_new_run_does_not_overwrite_an_old_one(tmp_path, capsys):
    argv = ["--defense", "madry", *TINY, "--epochs", "1", "--out-dir", str(tmp_path)]
    train_cifar.main(argv)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    capsys.readouterr()
    assert "--resume" in fails_in_one_line(train_cifar.main, argv, capsys)
    assert "--spat-alpha 0.3" in fails_in_one_line(train_cifar.main, [*argv, "--resume", "--spat-alpha", "0.3"], capsys)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def run_until(stop_after, argv, monkeypatch):
    """A run that is interrupted after so many steps."""
    real, calls = data.augment, []

    def stop(*args):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(data, "augment", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_cifar.main(argv)
    monkeypatch.setattr(data, "augment", real)


def without_times(path):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
            for row in csv.DictReader(open(path))]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("stop_after, flags", [
    (1, []), (3, []), (4, ["--precision", "bf16"]), pytest.param(4, [], marks=pytest.mark.slow),
    pytest.param(5, [], marks=pytest.mark.slow), pytest.param(4, ["--compile", "on"], marks=pytest.mark.slow),
])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch, stop_after, flags):
    """Stopped after any step and resumed: bit-identical weights and best.pt, the same log."""
    argv = ["--defense", "mart", "--spat-alpha", "0.3", *TINY, "--save-minutes", "0", *flags]
    if "bf16" in flags or stop_after == 1:
        monkeypatch.setattr(models, "build_model", tiny_model)
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    run_until(stop_after, [*argv, "--out-dir", str(tmp_path / "cut")], monkeypatch)
    torch.manual_seed(123)  # whatever the global state is
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    assert without_times(tmp_path / "cut/log.csv") == without_times(tmp_path / "whole/log.csv")
    for name in ("last.pt", "best.pt"):
        whole, cut = (checkpoints.load(tmp_path / run / name)["state_dict"] for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.usefixtures("tiny_net")
def test_the_seconds_of_an_epoch_are_those_before_and_after_a_stop(tmp_path, monkeypatch):
    argv = ["--defense", "madry", *TINY, "--save-minutes", "0", "--out-dir", str(tmp_path / "run")]
    run_until(2, argv, monkeypatch)
    last = checkpoints.load(tmp_path / "run/last.pt")
    seconds, steps = last["timed"]
    assert steps == last["step"] == 2 and 0 < seconds < 60
    checkpoints.save(last | {"timed": (1000.0, steps)}, tmp_path / "run/last.pt")
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "run")])
    first, second = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert 1000 < float(first["seconds"]) < 1060 and float(second["seconds"]) < 60
    assert float(first["images_per_s"]) == pytest.approx(48 / float(first["seconds"]), rel=1e-4)
    assert checkpoints.load(tmp_path / "run/last.pt")["timed"] == (0.0, 0)


def pretend_validation(natural, robust, monkeypatch):
    """The accuracies on the held-out images, epoch by epoch."""
    rows = [{"val_natural_accuracy": a, "val_robust_accuracy": b, "val_natural_loss": 2.0, "val_robust_loss": 2.0}
            for a, b in zip(natural, robust, strict=True)]
    monkeypatch.setattr(models, "build_model", tiny_model)
    monkeypatch.setattr(train_cifar, "validate", lambda *_: rows.pop(0))


@pytest.mark.parametrize("defense, natural, robust, best", [
    ("madry", (0.9, 0.1), (0.2, 0.3), 2), ("standard", (0.9, 0.1), (0.2, 0.3), 1),
    ("madry", (0.9, 0.1), (0.3, 0.3), 2),
])
def test_the_best_epoch(defense, natural, robust, best, tmp_path, monkeypatch):
    """By robust accuracy, by natural accuracy in standard training; of equals the later one, at a lower rate."""
    pretend_validation(natural, robust, monkeypatch)
    train_cifar.main(["--defense", defense, *TINY, "--out-dir", str(tmp_path)])
    assert checkpoints.load(tmp_path / "best.pt")["epoch"] == best


def test_a_resumed_run_remembers_its_best(tmp_path, monkeypatch):
    """Stopped after an epoch that was better than any to come."""
    pretend_validation((0.5, 0.5), (0.9, 0.1), monkeypatch)
    run_until(3, ["--defense", "madry", *TINY, "--out-dir", str(tmp_path)], monkeypatch)
    train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    assert checkpoints.load(tmp_path / "best.pt")["epoch"] == 1 and checkpoints.load(tmp_path / "last.pt")["epoch"] == 2


def test_it_saves_every_so_many_minutes(tmp_path, monkeypatch):
    """By a clock on which every step takes 25 seconds."""
    monkeypatch.setattr(models, "build_model", tiny_model)
    saved, clock, real = [], [0.0], data.augment

    def slow(*args):
        clock[0] += 25
        return real(*args)

    monkeypatch.setattr(data, "augment", slow)
    monkeypatch.setattr(train_cifar.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoints, "save_run", lambda state, out_dir: saved.append(state["step"]))
    train_cifar.main(["--defense", "madry", *TINY, "--epochs", "1", "--batch-size", "8", "--save-minutes", "1",
                      "--out-dir", str(tmp_path)])
    assert saved == [0, 3, 6]  # after 75 seconds, and at the end


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("left", [{"args.json", ".lock"}, {"last.pt"}, {"last.prev.pt"}, {"best.pt"}, {"log.csv"}])
def test_a_run_is_not_overwritten_but_one_that_saved_nothing_starts_again(tmp_path, capsys, left):
    for name in left:
        (tmp_path / name).write_text("as it was")
    argv = ["--defense", "standard", *TINY, "--epochs", "1", "--out-dir", str(tmp_path)]
    if "args.json" in left:  # killed before its first checkpoint
        train_cifar.main(argv)
        assert json.loads((tmp_path / "args.json").read_text())["epochs"] == 1
    else:
        assert "holds a run already" in fails_in_one_line(train_cifar.main, argv, capsys)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(left, "as it was")


@pytest.mark.usefixtures("tiny_net")
def test_a_finished_run_may_be_resumed_again(tmp_path, capsys):
    """As a job that is queued once too often does; and "auto" is what it came to."""
    train_cifar.main(["--defense", "madry", *TINY, "--out-dir", str(tmp_path)])
    before, weights = (tmp_path / "log.csv").read_bytes(), (tmp_path / "last.pt").read_bytes()
    train_cifar.main(["--resume", "--out-dir", str(tmp_path), "--precision", "auto", "--compile", "auto"])
    assert (tmp_path / "log.csv").read_bytes() == before and (tmp_path / "last.pt").read_bytes() == weights
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["precision"], args["compile"]) == ("fp32", "off")
    assert capsys.readouterr().out.endswith(f"python eval_attacks.py --model-path {tmp_path / 'best.pt'}\n")
    content = checkpoints.load(tmp_path / "last.pt")
    content["args"]["compile"] = "on"  # what "graphs" becomes without a GPU
    checkpoints.save(content, tmp_path / "last.pt")
    typed = {"resume": True, "out_dir": str(tmp_path), "compile": "graphs"}
    assert train_cifar.new_or_resumed(typed)[0].compile == "graphs"
    line = fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", tmp_path, "--compile", "off"], capsys)
    assert "--compile off would alter" in line


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_up_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, number, status):
    argv = ["--defense", "madry", *TINY]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    real, calls = data.augment, []

    def raise_signal(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(data, "augment", raise_signal)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main([*argv, "--out-dir", str(tmp_path / "cut")])
    assert exit_info.value.code == status and len(calls) == 2
    out, err = capsys.readouterr()
    assert train_cifar.STOPPING in err
    command = out.strip().splitlines()[-1]
    assert command == f"python train_cifar.py --resume --out-dir {tmp_path / 'cut'}"
    assert checkpoints.load(tmp_path / "cut/last.pt")["step"] == 1  # the attack of the second was given up
    train_cifar.main(command.split()[2:])
    whole, cut = (checkpoints.load(tmp_path / run / "last.pt")["state_dict"] for run in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_signal_while_compiling_leaves_the_directory_as_it_was(tmp_path, monkeypatch, capsys, resumed):
    """It reaches the compiler too, which fails: a run that went on would be eager to its end."""
    argv = ["--defense", "madry", *TINY, "--out-dir", str(tmp_path)]
    if resumed:
        train_cifar.main(argv)
        argv = ["--resume", "--out-dir", str(tmp_path), "--compile", "auto"]
    before = {path: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    real = runtime.forward_pass

    def broken(args, *rest, **more):
        signal.raise_signal(signal.SIGINT)
        passes = real(args, *rest, **more)
        args.compile = "on"  # what came of it, as the real one writes it, is another level now
        return passes

    monkeypatch.setattr(runtime, "forward_pass", broken)
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main(argv)
    assert exit_info.value.code == 130
    assert {path: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before
    says = "go on with\npython train_cifar.py --resume" if resumed else "the same command starts again"
    assert says in capsys.readouterr().out
    monkeypatch.setattr(runtime, "forward_pass", real)
    train_cifar.main(argv)
    assert (tmp_path / "last.pt").exists()


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_in_validation_is_seen_and_the_epoch_validated_on_resume(tmp_path, monkeypatch, epoch):
    """To the bit as if it had not been; the row is logged once, with its rate."""
    argv = ["--defense", "madry", *TINY, "--lr-schedule", "onecycle"]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    real, calls = train_cifar.validate, []

    def interrupted(model, forward, val_set, args):
        calls.append(args)
        if len(calls) == epoch:
            signal.raise_signal(signal.SIGINT)
        return real(model, forward, val_set, args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(train_cifar, "validate", interrupted)
        train_cifar.main([*argv, "--out-dir", str(tmp_path / "cut")])
    assert exit_info.value.code == 130
    cut = checkpoints.load(tmp_path / "cut/last.pt")
    assert cut["step"] == 3 * epoch and len(cut["rows"]) == epoch - 1
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    for name in ("last.pt", "best.pt"):
        whole, cut = (checkpoints.load(tmp_path / run / name) for run in ("whole", "cut"))
        assert [whole[key] for key in ("step", "best")] == [cut[key] for key in ("step", "best")]
        assert len(cut["rows"]) == len(whole["rows"]) and torch.equal(cut["sums"], whole["sums"])
        assert all(torch.equal(cut["state_dict"][key], value) for key, value in whole["state_dict"].items())
    assert without_times(tmp_path / "whole/log.csv") == without_times(tmp_path / "cut/log.csv")


def test_a_second_signal_ends_the_process_at_once():
    code = """import signal, runtime
with runtime.deferred_signals("stopping") as received:
    signal.raise_signal(signal.SIGINT)
    print(received, flush=True)
    signal.raise_signal(signal.SIGINT)
    print("still there")"""
    folder = pathlib.Path(train_cifar.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "[2]\n", "\nstopping\n")


@pytest.mark.usefixtures("no_curves")
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    """The kernel refuses what goes beyond a limit in the middle of the fourth save, as a full disk does."""
    argv = ["--defense", "madry", *TINY, "--save-minutes", "0", "--out-dir", str(tmp_path)]
    real, saves, before = torch.save, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, file):
        saves.append(1)
        if len(saves) == 4:  # the one at the start, and one after each step
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(SystemExit) as exit_info:
            train_cifar.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in exit_info.value.code and f"{tmp_path / 'last.pt'} and" in exit_info.value.code
    assert checkpoints.load(tmp_path / "last.pt")["step"] == 2
    monkeypatch.setattr(torch, "save", real)
    train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    assert checkpoints.load(tmp_path / "last.pt")["epoch"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.usefixtures("tiny_net")
def test_a_run_that_dies_at_its_first_epochs_end_can_be_resumed(tmp_path, monkeypatch):
    """best.pt and the log are written before last.pt: what dies between them must not be left without one."""
    argv = ["--defense", "madry", *TINY]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cifar, "write_log", die)
        train_cifar.main([*argv, "--out-dir", str(tmp_path / "cut")])
    assert (tmp_path / "cut/best.pt").exists()
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    for name in ("last.pt", "best.pt"):
        whole, cut = (checkpoints.load(tmp_path / run / name)["state_dict"] for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


@pytest.mark.usefixtures("tiny_net")
def test_what_cannot_be_resumed_is_said(tmp_path, capsys):
    train_cifar.main(["--defense", "madry", *TINY, "--epochs", "1", "--out-dir", str(tmp_path)])
    state = checkpoints.load(tmp_path / "last.pt")
    capsys.readouterr()
    for key in ("optimizer", "on"):
        checkpoints.save(state | {key: None}, tmp_path / "last.pt")
        line = fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", tmp_path], capsys)
        assert f"holds no {key}" in line
    args = {key: value for key, value in state["args"].items() if key != "aux_data"}
    checkpoints.save(state | {"args": args}, tmp_path / "last.pt")
    line = fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", tmp_path], capsys)
    assert "older version: it has no aux_data" in line


@pytest.mark.usefixtures("tiny_net")
def test_no_mirror_is_kept_and_goes_on(tmp_path, monkeypatch, capsys):
    """Digits as a folder are mirrored unless told otherwise, which cost 6 points natural and 20 robust."""
    folder, mirrored = digits_folder(tmp_path / "folder"), []
    augment = data.augment

    def spy(images, generator, mirror=True, padding=4):
        mirrored.append(mirror)
        return augment(images, generator, mirror, padding)

    monkeypatch.setattr(data, "augment", spy)
    flags = ["--defense", "standard", "--dataset", str(folder), "--epochs", "2", "--val-size", "4", "--batch-size",
             "16", "--precision", "fp32", "--compile", "off"]
    for name, more, expected in (("plain", [], True), ("not", ["--no-mirror"], False), ("yes", ["--mirror"], True)):
        mirrored.clear()
        train_cifar.main([*flags, *more, "--out-dir", str(tmp_path / name)])
        assert set(mirrored) == {expected}
    assert checkpoints.load(tmp_path / "not/best.pt")["args"]["mirror"] is False
    capsys.readouterr()
    resume = ["--resume", "--out-dir", tmp_path / "not", "--mirror"]
    assert "--mirror True would alter" in fails_in_one_line(train_cifar.main, resume, capsys)
    mirrored.clear()
    train_cifar.main(["--defense", "madry", *TINY, "--out-dir", str(tmp_path / "digits")])
    assert set(mirrored) == {False}
    with pytest.raises(SystemExit):
        train_cifar.main(["--help"])
    assert "--no-mirror" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_net")
def test_a_run_older_than_a_flag_is_resumed_with_what_it_did(tmp_path, monkeypatch):
    argv = ["--defense", "madry", *TINY, "--save-minutes", "0"]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    run_until(2, [*argv, "--out-dir", str(tmp_path / "cut")], monkeypatch)
    old = checkpoints.load(tmp_path / "cut/last.pt")
    del old["args"]["mirror"], old["image_size"]
    checkpoints.save(old, tmp_path / "cut/last.pt")
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    whole, cut = (checkpoints.load(tmp_path / run / "last.pt") for run in ("whole", "cut"))
    assert all(torch.equal(whole["state_dict"][key], cut["state_dict"][key]) for key in whole["state_dict"])
    assert cut["args"]["mirror"] is None and cut["image_size"] == [32, 32]


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_resume_falls_back_on_the_checkpoint_before(tmp_path, damage, capsys):
    argv = ["--defense", "madry", *TINY, "--out-dir", str(tmp_path)]
    train_cifar.main(argv)
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    end = checkpoints.load(last)["state_dict"]
    middle = len(whole) // 2
    damaged = {"cut": whole[:middle], "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    last.write_bytes(damaged.get(damage, b""))
    if damage == "removed":
        last.unlink()
    capsys.readouterr()
    train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    assert "last.prev.pt" in capsys.readouterr().out
    assert all(torch.equal(value, end[key]) for key, value in checkpoints.load(last)["state_dict"].items())


@pytest.mark.usefixtures("tiny_net")
def test_a_failed_save_after_a_fall_back_leaves_what_it_fell_back_on(tmp_path, monkeypatch):
    """The damaged last.pt must not have taken the place of last.prev.pt by then."""
    argv = ["--defense", "madry", *TINY, "--out-dir", str(tmp_path)]
    train_cifar.main(argv)
    (tmp_path / "last.pt").write_bytes(b"cut")
    step, real = checkpoints.load(tmp_path / "last.prev.pt")["step"], torch.save

    def full(state, file):
        if state["optimizer"]:  # last.pt, not best.pt
            raise OSError(28, "No space left on device")
        real(state, file)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left on device"):
        patch.setattr(torch, "save", full)
        train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    assert checkpoints.load_run(tmp_path)["step"] == step


def test_a_gpu_out_of_memory_ends_in_one_line(tmp_path, monkeypatch):
    """Before the first checkpoint was written, so none is named."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runtime, "forward_pass", full)
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main(["--defense", "madry", *TINY, "--out-dir", str(tmp_path)])
    assert exit_info.value.code == "train_cifar.py: CUDA out of memory.; no checkpoint was written yet"


@pytest.mark.usefixtures("tiny_net")
@pytest.mark.parametrize("defense, passes", [("standard", 2), ("madry", 2 + 4)])
def test_the_work_by_which_compile_auto_decides(defense, passes, tmp_path, monkeypatch):
    asked = []
    real = runtime.forward_pass
    monkeypatch.setattr(runtime, "forward_pass", lambda *given, **more: asked.append(given[3]) or real(*given, **more))
    train_cifar.main(["--defense", defense, *TINY, "--out-dir", str(tmp_path)])
    assert asked == [2 * 3 * passes]  # epochs, steps of each


@pytest.mark.parametrize("values, epochs, defense, warned", [
    ((0.1, 0.1, 0.09, 0.1, 0.1, 0.1), 6, "mart", True), ((0.1, 0.1, 0.09, 0.1), 9, "mart", False),
    ((0.1,) * 4, 4, "standard", False), ((0.1, 0.1, 0.1, 0.1, 0.3, 0.1), 6, "mart", False),
    ((None,) * 6, 6, "mart", False),
])
def test_robust_accuracy_at_chance_is_warned_about(values, epochs, defense, warned):
    rows = [{"epoch": i, "lr": 0.1, "train_loss": 2.0, "images_per_s": 50.0, "val_natural_accuracy": 0.2, "seconds": 90,
             "val_robust_accuracy": value} for i, value in enumerate(values, start=1)]
    text = train_cifar.summary(rows, argparse.Namespace(epochs=epochs, defense=defense), 10)
    assert ("at chance" in text) == warned
    left = {0: "0 seconds left", 5: "8 minutes left"}[epochs - len(rows)]
    assert f"50 img/s  {left}" in text


@pytest.mark.usefixtures("tiny_net")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    argv = ["--defense", "madry", *TINY, "--lr", "1e30", "--out-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main(argv)
    message = str(exit_info.value.code)
    assert "step" in message and "lr" in message and "last.pt" in message


@pytest.mark.usefixtures("tiny_net")
def test_weights_that_the_last_update_breaks_are_not_saved(tmp_path, monkeypatch):
    """The loss of that step is of before the update."""
    steps = []

    def poisoned(model):
        steps.append(1)
        if len(steps) == 6:
            next(model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(runtime, "broadcast_buffers", poisoned)  # what comes after the update
    with pytest.raises(SystemExit, match="weights are not finite after step 6"):
        train_cifar.main(["--defense", "madry", *TINY, "--out-dir", str(tmp_path)])
    for name in ("last.pt", "best.pt"):
        assert all(v.isfinite().all() for v in checkpoints.load(tmp_path / name)["state_dict"].values()), name


def test_the_tally_counts_per_example():
    """Four examples of two classes: p_y(x) and p_y(x_adv) set by hand."""
    p_nat, p_adv = torch.tensor([0.95, 0.6, 0.75, 0.2]), torch.tensor([0.45, 0.7, 0.75, 0.1])
    y = torch.tensor([0, 0, 0, 0])

    class Model(torch.nn.Module):
        def forward(self, p):
            return torch.stack([p.log(), (1 - p).log()], 1)

    model, loss = Model(), torch.tensor(1.5)
    assert train_cifar.tally(loss, model(p_nat), model(p_adv), y).tolist() == [1.5, 0.75, 0.5]
    assert train_cifar.tally(loss, model(p_nat), None, y).tolist() == [1.5, 0.75, 0]
    for alpha, step, expected in ((0.3, 8, [2, 1, 4]), (None, 8, [0, 1, 4]), (0.3, 9, [0, 0, 0])):
        args = argparse.Namespace(spat_alpha=alpha, defense="madry")
        run = argparse.Namespace(model=model, args=args, step=step, steps_per_epoch=20)
        assert train_cifar.sampled_shares(run, model, p_nat, p_adv, y).tolist() == expected
    run.step, args.defense = 8, "standard"
    assert train_cifar.sampled_shares(run, model, p_nat, p_nat, y).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("tiny_net")
def test_the_shares_are_of_the_model_that_was_attacked(tmp_path, monkeypatch):
    order = []

    def note(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **more: order.append(name) or real(*given, **more))

    note(train_cifar, "inner_maximisation")
    note(train_cifar, "sampled_shares")
    note(train_cifar, "forward_backward")
    train_cifar.main(["--defense", "madry", *TINY, "--epochs", "1", "--out-dir", str(tmp_path)])
    assert order == ["inner_maximisation", "sampled_shares", "forward_backward"] * 3


@pytest.mark.slow
def test_on_digits_mart_with_spat_stands_where_a_standard_model_falls(tmp_path):
    """The claim of the quick start, at its real settings: PGD-20 breaks the standard model, not the other."""
    robust = {}
    for name, flags in (("standard", []), ("mart", ["--spat-alpha", "0.3"])):
        train_cifar.main(["--defense", name, *flags, "--dataset", "digits", "--out-dir", str(tmp_path / name)])
        result = eval_attacks.main(["--model-path", str(tmp_path / name / "best.pt"), "--attacks", "natural", "pgd"])
        natural, robust[name] = (row["accuracy"] for row in result["attacks"])
        assert natural > robust[name]
    assert robust["standard"] < 0.4 and robust["mart"] >= robust["standard"] + 0.3


def test_a_damaged_checkpoint_without_one_before_it_is_named(tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(b"cut")
    line = fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", tmp_path], capsys)
    assert "last.pt: not a model file" in line and "last.prev.pt" not in line
