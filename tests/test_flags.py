"""Every flag is turned once, and the change is looked for in what comes out and not in the parsed arguments.

A row: what both runs get, what the second one gets besides, and the change that must be seen. A new flag needs a row.
"""

import argparse
import contextlib
import csv
import json
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import like_cuda_graphs, tiny_model
from PIL import Image

import attacks
import audit
import checkpoints
import compare
import data
import eval_attacks
import models
import pseudo_label
import reproduce
import train_cifar

NO_CUDA = "torch finds no CUDA device here"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, model_path):
    """run(main, argv): its result, what it printed, its one line of error, and what torch.compile was asked for. In a
    folder with another model, a data set of two classes, a damaged CIFAR-10 and pseudo-labelled images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(model_path.read_bytes())
    content = checkpoints.load(model_path)
    content["state_dict"]["fc.weight"] = -content["state_dict"]["fc.weight"]
    checkpoints.save(content, tmp_path / "other.pt")
    g = np.random.default_rng(0)
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "animals" / place).mkdir(parents=True)
        for i in range(24):
            pixels = g.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "animals" / place / f"{i}.png")
    (tmp_path / "cut/cifar-10-batches-py").mkdir(parents=True)
    np.savez("aux.npz", data=g.integers(256, size=(20, 32, 32, 3), dtype=np.uint8),
             extrapolated_targets=g.integers(10, size=20))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(how["mode"]) or like_cuda_graphs(f))

    def call(main, argv):
        compiled.clear()
        capsys.readouterr()
        result = None
        with contextlib.suppress(SystemExit):
            result = main(shlex.split(argv))
        printed, error = capsys.readouterr()
        return argparse.Namespace(result=result, printed=printed, error=error, compiled=list(compiled))

    return call


def flags_of(parse_args, argv, monkeypatch):
    """The long flags of a script's parser, of those that have no row but --help."""
    seen, real = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or real(self, *a))
    parse_args(argv)
    options = [option for action in seen[0]._actions for option in action.option_strings]
    return {option for option in options if option.startswith("--") and not option.startswith("--no-")} - {"--help"}


# Training. ------------------------------------------------------------------------------------------------------------

TRAIN_BASE = ("--defense mart --dataset digits --limit-train 32 --val-size 16 --batch-size 16 --epochs 2 --num-steps 1 "
              "--precision fp32 --compile off --save-minutes 10 --out-dir ")


def trained(run, flags, out_dir):
    """A run and what it left: its rows of log.csv, weights, number of steps, files, and the step of last.prev.pt."""
    found = run(train_cifar.main, TRAIN_BASE + out_dir + " " + flags)
    with contextlib.suppress(OSError):
        found.rows = list(csv.DictReader(open(f"{out_dir}/log.csv")))
        last = checkpoints.load(f"{out_dir}/last.pt")
        found.weights, found.step, found.on = last["state_dict"], last["step"], last["on"]
        found.step_before = checkpoints.load(f"{out_dir}/last.prev.pt")["step"]
        found.best = checkpoints.pathlib.Path(out_dir, "best.pt").exists()
    return found


def weights_differ(before, after):
    pairs = zip(before.weights.values(), after.weights.values(), strict=True)
    return any(a.is_floating_point() and not torch.equal(a, b) for a, b in pairs)


def rates(found):
    return [float(row["lr"]) for row in found.rows]


TRAIN = {
    "--defense": ("", "--defense madry", weights_differ),
    "--spat-alpha": ("--defense trades", "--spat-alpha 0", weights_differ),  # KL against CE
    "--beta": ("", "--beta 1", weights_differ),
    "--arch": ("", "--arch wrn-10-2", lambda _, after: len(after.weights["block1.layer.0.conv1.weight"]) == 32),
    "--recipe": ("", "--recipe rst", lambda _, after: rates(after) == [0.1, 0.05]),
    "--seed": ("", "--seed 2", weights_differ),
    "--dataset": ("", "--dataset animals", lambda _, after: len(after.weights["4.bias"]) == 2),
    "--data-dir": ("--dataset cifar10", "--data-dir cut", lambda _, after: "cut/cifar-10-batches-py" in after.error),
    "--val-size": ("", "--val-size 0", lambda before, after: before.best and not after.best),
    "--limit-train": ("", "--limit-train 48", lambda before, after: (before.step, after.step) == (4, 6)),
    "--aux-data": ("", "--aux-data aux.npz", weights_differ),
    "--aux-fraction": ("--aux-data aux.npz", "--aux-fraction 0.25", weights_differ),
    "--epochs": ("", "--epochs 1", lambda before, after: (len(before.rows), len(after.rows)) == (2, 1)),
    "--batch-size": ("", "--batch-size 8", lambda before, after: (before.step, after.step) == (4, 8)),
    "--lr": ("", "--lr 0.1", lambda before, after: weights_differ(before, after) and rates(before)[1] > rates(after)[1]),
    "--lr-schedule": ("--lr 0.1", "--lr-schedule cosine", lambda _, after: rates(after) == [0.1, 0.05]),
    "--lr-milestones": ("--lr 1 --lr-schedule step", "--lr-milestones 1 2", lambda before, after: (
        rates(before), rates(after)) == ([1, 0.1], [0.1, 0.01])),
    "--momentum": ("", "--momentum 0.5", weights_differ),
    "--nesterov": ("", "--nesterov", weights_differ),
    "--weight-decay": ("", "--weight-decay 0.1", weights_differ),
    "--epsilon": ("--step-size 0.1", "--epsilon 0.02", weights_differ),
    "--step-size": ("", "--step-size 0.001", weights_differ),
    "--num-steps": ("", "--num-steps 2", weights_differ),
    "--random-start": ("", "--random-start none", weights_differ),
    "--precision": ("", "--precision bf16", weights_differ),
    # the compiler itself takes a minute: here it is asked, and what it is asked for is looked at
    "--compile": ("", "--compile on", lambda before, after: (before.compiled, after.compiled) == ([], ["default"])),
    "--device": ("", "--device cuda", lambda before, after: (
        after.on == ["cuda", 1] if torch.cuda.is_available() else NO_CUDA in after.error)),
    "--out-dir": ("", "--out-dir elsewhere", lambda before, after: (
        before.step == 4 and not hasattr(after, "step") and "elsewhere/best.pt" in after.printed)),
    "--save-minutes": ("", "--save-minutes 0", lambda before, after: (before.step_before, after.step_before) == (2, 3)),
    "--resume": ("", "--out-dir before --resume", lambda before, after: "before/best.pt" in after.printed),
}


@pytest.mark.parametrize("flag", TRAIN)
def test_train(flag, run, monkeypatch):
    real = models.build_model
    monkeypatch.setattr(models, "build_model", lambda name, classes=10: (
        tiny_model(name, classes) if name in ("wrn-10-1", "wrn-28-10") else real(name, classes)))
    common, turned, change = TRAIN[flag]
    before, after = trained(run, common, "before"), trained(run, f"{common} {turned}", "after")
    assert change(before, after), (before.error, after.error)


def test_two_runs_with_the_same_flags_are_equal(run, monkeypatch):
    """Else a change of the weights would say nothing."""
    monkeypatch.setattr(models, "build_model", tiny_model)
    assert not weights_differ(trained(run, "", "one"), trained(run, "", "two"))


# Evaluation. ----------------------------------------------------------------------------------------------------------

EVAL_BASE = ("--model-path model.pt --num-images 16 --num-steps 2 --cw-steps 2 --precision fp32 --compile off "
             "--save-images --save-examples ")


def evaluated(run, flags, out):
    """A run and the attacked images of each kind of attack: "PGD" of "PGD-2 x2"."""
    found = run(eval_attacks.main, f"{EVAL_BASE}{out}.npz {flags}")
    if found.result:
        found.names = [row["name"] for row in found.result["attacks"]]
        saved = np.load(f"{out}.npz")
        found.images = {re.match(r"images/(\w+)", key)[1]: saved[key] for key in saved if key.startswith("images/")}
    return found


def images_of(*names):
    """The change: the images of these attacks differ, and those of no other."""
    def change(before, after):
        differ = {name for name in before.images if not np.array_equal(before.images[name], after.images[name])}
        return differ == set(names)

    return change


def error(message):
    """The change: it ends with this error."""
    return lambda before, after: after.result is None and message in after.error and not before.error.count("error:")


def radii(before, after):
    natural = np.load("after.npz")["images/Natural"]
    found = {name: np.abs(np.load("after.npz")[f"images/{name}"] - natural).max() for name in ("FGSM ε 0.02", "FGSM ε 0.1")}
    return list(found.values()) == pytest.approx([0.02, 0.1])


EVALUATION = {
    "--model-path": ("", "--model-path other.pt", images_of("FGSM", "PGD", "CW")),
    "--dataset": ("", "--dataset animals", error("model.pt has 10 classes, animals has 2")),
    "--data-dir": ("", "--dataset cifar10 --data-dir cut", error("cut/cifar-10-batches-py is incomplete")),
    "--num-images": ("", "--num-images 8", lambda _, after: len(after.images["PGD"]) == after.result["n"] == 8),
    "--arch": ("", "--arch wrn-16-2", error("it is a wrn-10-1, not a wrn-16-2")),
    "--num-classes": ("", "--num-classes 9", error("it has 10 classes, not 9")),
    "--normalize": ("", "--normalize 0.5,0.5,0.5 0.5,0.5,0.5", images_of("FGSM", "PGD", "CW")),
    "--attacks": ("", "--attacks cw", lambda _, after: after.names == ["CW-inf"] and list(after.images) == ["CW"]),
    "--protocol": ("--epsilon 0.031", "--protocol rst --attacks natural fgsm pgd cw", images_of("PGD", "CW")),
    "--epsilon": ("--step-size 0.1", "--epsilon 0.02", images_of("FGSM", "PGD", "CW")),
    "--epsilons": ("", "--epsilons 0.02 0.1", radii),
    "--num-steps": ("", "--num-steps 3", images_of("PGD")),
    "--steps-sweep": ("", "--steps-sweep 1 3", lambda _, after: (
        after.names == ["Natural", "FGSM", "PGD-1", "PGD-3", "CW-inf", "Worst case"])),
    "--cw-steps": ("", "--cw-steps 3", images_of("CW")),
    "--step-size": ("", "--step-size 0.001", images_of("PGD", "CW")),
    "--random-start": ("", "--random-start none", images_of("PGD", "CW")),
    "--restarts": ("", "--restarts 2", images_of("PGD", "CW")),
    "--any-step": ("--step-size 0.1 --num-steps 3", "--any-step", images_of("PGD", "CW")),
    "--alphas": ("--attacks natural pgd-ls --alphas 0", "--alphas 1", images_of("PGD")),
    "--kappas": ("", "--kappas 0", images_of("CW")),
    "--pool": ("", "--pool", images_of("FGSM", "PGD", "CW")),
    "--seed": ("", "--seed 1", images_of("PGD", "CW")),
    "--tf32": ("", "--tf32", error("--tf32: a CPU does not have it")),  # it alters convolutions on a GPU alone
    "--precision": ("", "--precision bf16", lambda before, after: after.images.keys() == before.images.keys() and (
        not np.array_equal(after.images["PGD"], before.images["PGD"]))),
    "--compile": ("", "--compile on", lambda before, after: (before.compiled, after.compiled) == ([], ["default"])),
    "--device": ("", "--device cuda", lambda before, after: (
        after.names == before.names if torch.cuda.is_available() else NO_CUDA in after.error)),
    "--batch-size": ("", "--batch-size 5", lambda before, after: (before.sizes, after.sizes) == ({16}, {5, 1})),
    "--json": ("", "--json after.json", lambda _, after: (
        json.load(open("after.json")) == json.loads(json.dumps(after.result)))),
    "--save-examples": ("", "--save-examples elsewhere.npz", lambda before, after: (
        np.load("elsewhere.npz").keys() == np.load("before.npz").keys())),
    "--save-images": ("", "", None),  # TODO
}


@pytest.mark.parametrize("flag", EVALUATION)
def test_evaluation(flag, run, monkeypatch):
    common, turned, change = EVALUATION[flag]
    before, after = evaluated(run, common, "before"), evaluated(run, f"{common} {turned}", "after")
    assert change(before, after), (before.error, after.error)
