"""Every flag is turned once, and the change is looked for in what comes out and not in the parsed arguments.

A row: what both runs get, what the second one gets besides, and the change that must be seen. A new flag needs a row.
"""

import argparse
import contextlib
import csv
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image

import attacks
import audit
import bench
import checkpoints
import compare
import eval_attacks
import models
import pseudo_label
import reproduce
import train_cifar

NO_CUDA = "torch finds no CUDA device here"


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_path):
    """A folder with two models, a data set of two classes, a damaged CIFAR-10 and pseudo-labelled images."""
    folder, g = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    (folder / "model.pt").write_bytes(model_path.read_bytes())
    content = checkpoints.load(model_path)
    foreign = dict(content["state_dict"])
    content["state_dict"]["fc.weight"] = -content["state_dict"]["fc.weight"]
    checkpoints.save(content, folder / "other.pt")
    checkpoints.save(foreign, folder / "foreign.pt")
    checkpoints.save({"state_dict": foreign, "ema": content["state_dict"]}, folder / "two.pt")
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / "animals" / place).mkdir(parents=True)
        for i in range(24):
            pixels = g.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "animals" / place / f"{i}.png")
    (folder / "cut/cifar-10-batches-py").mkdir(parents=True)
    np.savez(folder / "aux.npz", data=g.integers(256, size=(20, 32, 32, 3), dtype=np.uint8),
             extrapolated_targets=g.integers(10, size=20))
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """run(main, argv): its result, what it printed, its line of error, what torch.compile was asked for, and of PGD the
    sizes of its batches, its starts and the types of its logits. In a folder that holds `files`."""
    monkeypatch.chdir(tmp_path)
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # curves.png takes half a second
    compiled, sizes, starts, types, real = [], [], [], [], attacks.pgd

    def pgd(model, x, target, objective, *, random_start="uniform", **settings):
        def noted(x):
            logits = model(x)
            types.append(logits.dtype)
            return logits

        sizes.append(len(x))
        starts.append(random_start)
        return real(noted, x, target, objective, random_start=random_start, **settings)

    monkeypatch.setattr(attacks, "pgd", pgd)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(how) or f)

    def call(main, argv):
        for noted in (compiled, sizes, starts, types):
            noted.clear()
        capsys.readouterr()
        found = argparse.Namespace(result=None)
        with contextlib.suppress(SystemExit):
            found.result = main(shlex.split(argv))
        found.printed, found.error = capsys.readouterr()
        found.compiled, found.sizes, found.starts, found.types = compiled[:], set(sizes), starts[:], set(types)
        return found

    return call


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Which is as quick for so little work, and far quicker where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def seen():
    """{(a function, flags): what it returned}: most rows begin with the same first run."""
    return {}


@pytest.fixture
def turn(run, seen):
    """turn(function, row): runs function(run, flags, name of the output) without and with the flag, and asserts that
    the row's change is seen."""
    def call(function, row):
        common, turned, change = row
        if (function, common) not in seen:
            seen[function, common] = function(run, common, "before")
        before, after = seen[function, common], function(run, f"{common} {turned}", "after")
        print(before.error, after.error)  # what pytest shows if the change is not there
        assert change(before, after)

    return call


def differ(what):
    """The change: this attribute of the two runs is another."""
    return lambda before, after: getattr(before, what) != getattr(after, what)


def error(message):
    """The change: it ends with this error."""
    return lambda before, after: after.result is None and message in after.error


COMPILES = differ("compiled")  # the compiler itself takes a minute: what it is asked for is looked at


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
        found.best = pathlib.Path(out_dir, "best.pt").exists()
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
    "--arch": ("", "--arch wrn-10-2", lambda _, after: "0.4.bias" in after.weights),  # a net of its own
    "--recipe": ("", "--recipe rst", lambda _, after: rates(after) == [0.1, 0.05]),
    "--seed": ("", "--seed 2", weights_differ),
    "--dataset": ("--arch wrn-10-1", "--dataset animals", lambda _, after: len(after.weights["4.bias"]) == 2),
    "--data-dir": ("--dataset cifar10", "--data-dir cut", lambda _, after: "cut/cifar-10-batches-py" in after.error),
    "--val-size": ("", "--val-size 0", lambda before, after: before.best and not after.best),
    "--limit-train": ("", "--limit-train 48", lambda before, after: (before.step, after.step) == (4, 6)),
    "--aux-data": ("", "--aux-data aux.npz", weights_differ),
    "--aux-fraction": ("--aux-data aux.npz", "--aux-fraction 0.25", weights_differ),
    "--epochs": ("", "--epochs 1", lambda before, after: (len(before.rows), len(after.rows)) == (2, 1)),
    "--batch-size": ("", "--batch-size 8", lambda before, after: (before.step, after.step) == (4, 8)),
    "--lr": ("--lr-schedule step", "--lr 0.1", lambda before, after: (
        weights_differ(before, after) and (rates(before), rates(after)) == ([0.2, 0.02], [0.1, 0.01]))),
    "--lr-schedule": ("--lr 0.1", "--lr-schedule cosine", lambda _, after: rates(after) == [0.1, 0.05]),
    "--lr-milestones": ("--lr 1 --lr-schedule step", "--lr-milestones 1 2", lambda before, after: (
        rates(before), rates(after)) == ([1, 0.1], [0.1, 0.01])),
    "--momentum": ("", "--momentum 0.5", weights_differ),
    "--nesterov": ("", "--nesterov", weights_differ),
    "--no-nesterov": ("--recipe rst", "--no-nesterov", weights_differ),
    "--mirror": ("", "--mirror", weights_differ),
    "--no-mirror": ("--dataset animals", "--no-mirror", weights_differ),
    "--weight-decay": ("", "--weight-decay 0.1", weights_differ),
    "--epsilon": ("--step-size 0.1", "--epsilon 0.02", weights_differ),
    "--step-size": ("", "--step-size 0.001", weights_differ),
    "--num-steps": ("", "--num-steps 2", weights_differ),
    "--random-start": ("", "--random-start none", weights_differ),
    "--early-stop": ("", "--early-stop 0", weights_differ),
    "--precision": ("", "--precision bf16", weights_differ),
    "--compile": ("", "--compile on", COMPILES),
    "--device": ("", "--device cuda", lambda before, after: (
        after.on == ["cuda", 1] if torch.cuda.is_available() else NO_CUDA in after.error)),
    "--out-dir": ("", "--out-dir elsewhere", lambda before, after: (
        before.step == 4 and not hasattr(after, "step") and "elsewhere/best.pt" in after.printed)),
    "--save-minutes": ("", "--save-minutes 0", lambda before, after: (before.step_before, after.step_before) == (2, 3)),
    "--resume": ("--seed 1", "--out-dir before --resume", lambda before, after: "before/best.pt" in after.printed),
}


@pytest.mark.parametrize("flag", TRAIN)
def test_train(flag, turn, monkeypatch):
    monkeypatch.setattr(models, "build_model", lambda name, classes=10: (
        torch.nn.Sequential(tiny_model(name, classes)) if name == "wrn-10-2" else tiny_model(name, classes)))
    turn(trained, TRAIN[flag])


def test_two_runs_with_the_same_flags_are_equal(run, monkeypatch):
    """Else a change of the weights would say nothing."""
    monkeypatch.setattr(models, "build_model", tiny_model)
    assert not weights_differ(trained(run, "", "one"), trained(run, "", "two"))


# Evaluation. ----------------------------------------------------------------------------------------------------------

EVAL_BASE = ("--model-path model.pt --num-images 16 --num-steps 2 --cw-steps 2 --precision fp32 --compile off "
             "--save-examples ")


def evaluated(run, flags, out):
    """A run and the attacked images of each kind of attack: "PGD" of "PGD-2 x2"."""
    found = run(eval_attacks.main, f"{EVAL_BASE}{out}.npz {flags}")
    if found.result:
        found.names = [row["name"] for row in found.result["attacks"]]
    with contextlib.suppress(OSError):
        found.saved = dict(np.load(f"{out}.npz"))
        found.images = {re.match(r"images/(\w+)", key)[1]: value for key, value in found.saved.items()
                        if key.startswith("images/")}
    return found


def evaluated_with_images(run, flags, out):
    return evaluated(run, "--save-images " + flags, out)


def images_of(*names):
    """The change: the images of these attacks differ, and those of no other."""
    def change(before, after):
        differ = {name for name in before.images if not np.array_equal(before.images[name], after.images[name])}
        return differ == set(names)

    return change


def two_radii(_, after):
    moved = [np.abs(after.saved[f"images/FGSM ε {epsilon}"] - after.saved["images/Natural"]).max()
             for epsilon in ("0.02", "0.1")]
    return moved == pytest.approx([0.02, 0.1])


EVALUATION = {
    "--model-path": ("", "--model-path other.pt", images_of("FGSM", "PGD", "CW")),
    "--dataset": ("", "--dataset animals", error("the model has 10 classes, animals has 2")),
    "--data-dir": ("", "--dataset cifar10 --data-dir cut", error("cut/cifar-10-batches-py is incomplete")),
    "--num-images": ("", "--num-images 8", lambda _, after: len(after.images["PGD"]) == after.result["n"] == 8),
    "--arch": ("", "--arch wrn-16-2", error("it is a wrn-10-1, not a wrn-16-2")),
    "--num-classes": ("", "--num-classes 9", error("it has 10 classes, not 9")),
    "--normalize": ("--model-path foreign.pt --dataset digits", "--normalize 0.5,0.5,0.5 0.5,0.5,0.5",
                    images_of("FGSM", "PGD", "CW")),
    "--weights": ("--model-path two.pt --dataset digits --weights state_dict", "--weights ema",
                  images_of("FGSM", "PGD", "CW")),
    "--attacks": ("", "--attacks cw", lambda _, after: after.names == ["CW-inf"] and list(after.images) == ["CW"]),
    "--protocol": ("--epsilon 0.031", "--protocol rst --attacks natural fgsm pgd cw", images_of("PGD", "CW")),
    "--epsilon": ("--step-size 0.1", "--epsilon 0.02", images_of("FGSM", "PGD", "CW")),
    "--epsilons": ("", "--epsilons 0.02 0.1", two_radii),
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
    # it alters a GPU's convolutions; test_tf32_crafts_and_never_counts looks at them
    "--tf32": ("", "--tf32", lambda before, after: (
        after.result["tf32"] if torch.cuda.is_available() else "--tf32: a CPU does not have it" in after.error)),
    "--precision": ("", "--precision bf16", lambda before, after: after.images.keys() == before.images.keys() and (
        not np.array_equal(after.images["PGD"], before.images["PGD"]))),
    "--compile": ("", "--compile on", COMPILES),
    "--device": ("", "--device cuda", lambda before, after: (
        after.names == before.names if torch.cuda.is_available() else NO_CUDA in after.error)),
    "--batch-size": ("", "--batch-size 5", lambda before, after: (before.sizes, after.sizes) == ({16}, {5})),
    "--json": ("", "--json after.json", lambda _, after: (
        json.load(open("after.json")) == json.loads(json.dumps(after.result)))),
    "--save-examples": ("", "--save-examples elsewhere.npz", lambda before, after: (
        np.load("elsewhere.npz").keys() == before.saved.keys() and not hasattr(after, "saved"))),
    "--save-images": ("", "--save-images", lambda before, after: len(after.images) == 4 and not before.images),
}


@pytest.mark.parametrize("flag", EVALUATION)
def test_evaluation(flag, turn):
    turn(evaluated if flag == "--save-images" else evaluated_with_images, EVALUATION[flag])


# The audit. -----------------------------------------------------------------------------------------------------------

AUDIT_BASE = "--model-path model.pt --num-images 16 --epsilon 0.05 --precision fp32 --compile off "


ASKED = {}  # {attack that is not PGD: what it was called with last}


def audited(run, flags, out):
    found = run(audit.main, AUDIT_BASE + flags)
    found.asked = dict(ASKED)
    return found


def numbers_differ(before, after):
    first, second = ({check["name"]: check["numbers"] for check in found.result["checks"]} for found in (before, after))
    return first["order"]["PGD-20"] != second["order"]["PGD-20"]


AUDIT = {
    "--model-path": ("", "--model-path other.pt", numbers_differ),
    "--dataset": ("", "--dataset animals", error("the model has 10 classes, animals has 2")),
    "--data-dir": ("", "--dataset cifar10 --data-dir cut", error("cut/cifar-10-batches-py is incomplete")),
    "--num-images": ("", "--num-images 8", lambda before, after: (before.sizes, after.sizes) == ({16}, {8})),
    "--arch": ("", "--arch wrn-16-2", error("it is a wrn-10-1, not a wrn-16-2")),
    "--num-classes": ("", "--num-classes 9", error("it has 10 classes, not 9")),
    "--normalize": ("--model-path foreign.pt --dataset digits", "--normalize 0.5,0.5,0.5 0.5,0.5,0.5",
                    numbers_differ),
    "--weights": ("--model-path two.pt --dataset digits --weights state_dict", "--weights ema", numbers_differ),
    "--epsilon": ("", "--epsilon 0.01", numbers_differ),
    "--square-queries": ("", "--square-queries 7", lambda before, after: (
        before.asked["square"]["num_queries"], after.asked["square"]["num_queries"]) == (1000, 7)),
    "--autoattack": ("", "--autoattack", lambda before, after: (
        len(before.asked["autoattack"]["components"]), len(after.asked["autoattack"]["components"])) == (2, 4)),
    "--oracle": ("--num-images 4 --alphas 1", "--oracle other.pt", lambda before, after: (
        "semantics" not in before.result and after.result["semantics"][0]["oracle_agrees"] < 0.2)),
    "--alphas": ("--num-images 4 --oracle other.pt --alphas 1", "--alphas 0.5", lambda _, after: (
        [row["name"] for row in after.result["semantics"] if row["name"].startswith("PGD-LS")] == ["PGD-LS 0.5"])),
    "--seed": ("", "--seed 1", lambda before, after: (
        not torch.equal(before.starts[-1], after.starts[-1])
        and all(before.asked[of]["seed"] == 0 and after.asked[of]["seed"] == 1 for of in ("square", "autoattack")))),
    "--precision": ("", "--precision bf16", lambda before, after: (
        before.types, after.types) == ({torch.float32}, {torch.bfloat16})),
    "--compile": ("", "--compile on", COMPILES),
    "--device": ("", "--device cuda", lambda before, after: (
        after.starts[0].is_cuda if torch.cuda.is_available() else NO_CUDA in after.error)),
    "--batch-size": ("", "--batch-size 5", lambda before, after: (before.sizes, after.sizes) == ({16}, {5})),
    "--json": ("", "--json after.json", lambda _, after: (
        json.load(open("after.json")) == json.loads(json.dumps(after.result)))),
}


@pytest.mark.parametrize("flag", AUDIT)
def test_audit(flag, turn, monkeypatch):
    """With attacks that are asked and do little."""
    monkeypatch.setattr(audit, "STEPS", (1, 2))
    monkeypatch.setattr(audit, "RESTARTS", 2)
    pgd = attacks.pgd
    monkeypatch.setattr(attacks, "pgd", lambda *of, num_steps, **rest: pgd(*of, num_steps=min(num_steps, 2), **rest))
    for name in ("square", "autoattack"):
        monkeypatch.setattr(attacks, name, lambda model, x, y, name=name, **how: ASKED.update({name: how}) or x)
    turn(audited, AUDIT[flag])


# Pseudo-labels. -------------------------------------------------------------------------------------------------------

LABEL_BASE = "--model-path model.pt --batch-size 16 --output "


def labelled(run, flags, out):
    """A run, the labels that it wrote, and the sizes of the batches that went through the model."""
    real, sizes = checkpoints.load_model, set()

    def load_model(*args, **how):
        model, info = real(*args, **how)
        model.register_forward_hook(lambda module, inputs, logits: sizes.add(len(logits)))
        return model, info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load_model", load_model)
        found = run(pseudo_label.main, f"{LABEL_BASE}{out}.npz {flags}")
    found.batches = sizes
    with contextlib.suppress(OSError):
        found.labels = np.load(f"{out}.npz")["extrapolated_targets"].tolist()
    return found


LABELS = {
    "--model-path": ("--images aux.npz", "--model-path other.pt", differ("labels")),
    "--images": ("", "--images aux.npz", lambda _, after: len(after.labels) == 20),
    "--dataset": ("", "--dataset digits", lambda _, after: len(after.labels) == 1397),
    "--skip": ("--dataset digits", "--skip 1300", lambda before, after: before.labels[1300:] == after.labels),
    "--data-dir": ("", "--dataset cifar10 --data-dir cut", error("cut/cifar-10-batches-py is incomplete")),
    "--output": ("--images aux.npz", "--output elsewhere.npz", lambda before, after: (
        np.load("elsewhere.npz")["extrapolated_targets"].tolist() == before.labels and not hasattr(after, "labels"))),
    "--normalize": ("--model-path foreign.pt --dataset digits", "--normalize 0.5,0.5,0.5 0.5,0.5,0.5",
                    differ("labels")),
    "--weights": ("--model-path two.pt --images aux.npz --weights state_dict", "--weights ema", differ("labels")),
    "--arch": ("--images aux.npz", "--arch wrn-16-2", error("it is a wrn-10-1, not a wrn-16-2")),
    "--batch-size": ("--images aux.npz", "--batch-size 5", lambda before, after: (
        before.batches, after.batches) == ({16}, {5})),
    "--device": ("--images aux.npz", "--device cuda", lambda before, after: (
        before.labels == after.labels if torch.cuda.is_available() else NO_CUDA in after.error)),
}


@pytest.mark.parametrize("flag", LABELS)
def test_pseudo_label(flag, turn):
    turn(labelled, LABELS[flag])


# Tables of the paper, and speed. --------------------------------------------------------------------------------------

def reproduced(run, flags, out):
    """What is printed of trainings, and the number of cells and of slots and the minutes that reproduce.run got."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "run", lambda cells, slots, minutes: ran.append(
            (len(cells), len(slots), minutes)) or ({}, 0))
        found = run(reproduce.main, f"table3 --scale digits {flags}")
    found.ran = ran[0] if ran else None
    found.commands = [line for line in found.printed.splitlines() if "train_cifar.py" in line]
    return found


REPRODUCE = {
    "--scale": ("--dry-run", "--scale cpu", lambda before, after: (
        "--dataset digits" in before.commands[0] and "--dataset digits" not in after.commands[0])),
    "--seeds": ("--dry-run --seeds 1 2", "--seeds 7", lambda before, after: (
        all("--seed 7" in line for line in after.commands) and 2 * len(after.commands) == len(before.commands))),
    "--cell": ("--dry-run", "--cell 2", lambda before, after: after.commands == before.commands[1:2]),
    "--jobs": ("", "--jobs 7", lambda before, after: (
        "on GPUs" in after.error if torch.cuda.device_count() else after.ran[1] == 7)),  # at most four without it
    "--minutes": ("", "--minutes 2.5", lambda before, after: (before.ran[2], after.ran[2]) == (None, 2.5)),
    "--dry-run": ("", "--dry-run", lambda before, after: before.ran[0] > 0 and after.ran is None and after.commands),
    "--report": ("", "--report", lambda before, after: before.ran[0] > 0 and after.ran is None),
    "--results-dir": ("--dry-run", "--results-dir mine", lambda before, after: (
        "mkdir -p results/table3-digits" in before.printed and "mkdir -p mine/table3-digits" in after.printed)),
    "--data-dir": ("--dry-run --scale cpu", "--data-dir here", lambda before, after: (
        all("--data-dir here" in line for line in after.commands))),
}


@pytest.mark.parametrize("flag", REPRODUCE)
def test_reproduce(flag, turn):
    turn(reproduced, REPRODUCE[flag])


BENCH_BASE = ("--arch wrn-10-1 --defense madry --batch-size 4 --eval-batch-size 4 --num-steps 1 --eval-steps 1 "
              "--repeats 1 --precision fp32 --compile off ")


def benched(run, flags, out):
    return run(bench.main, BENCH_BASE + flags)


def counting(time_row):
    """bench.time_row, and in the row the products that the convolutions of one call take."""
    def count(args, side, work, function):
        products = []
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, _, out: products.append(
            out.numel() * module.weight[0].numel() if isinstance(module, torch.nn.Conv2d) else 0))
        function()
        hook.remove()
        return time_row(args, side, work, function) | {"products": sum(products)}

    return count


def work_differs(*names):
    """The change: the products of these works are another number, and those of no other."""
    def change(before, after):
        first, second = ({row["work"]: row["products"] for row in found.result["rows"]} for found in (before, after))
        return {name for name in first if second[name] != first[name]} == set(names)

    return change


def sides(found):
    return {row["side"] for row in found.result["rows"]}


BENCH = {
    "--arch": ("", "--arch wrn-10-2", work_differs("training step", "attack alone", "evaluation")),
    "--defense": ("", "--defense mart", work_differs("training step")),
    "--batch-size": ("", "--batch-size 5", work_differs("training step", "attack alone")),
    "--eval-batch-size": ("", "--eval-batch-size 5", work_differs("evaluation")),
    "--num-steps": ("", "--num-steps 2", work_differs("training step", "attack alone")),
    "--eval-steps": ("", "--eval-steps 2", work_differs("evaluation")),
    "--repeats": ("", "--repeats 2", lambda before, after: [
        {len(row["seconds"]) for row in found.result["rows"]} for found in (before, after)] == [{1}, {2}]),
    "--json": ("", "--json after.json", lambda _, after: json.load(open("after.json"))["rows"] == after.result["rows"]),
    "--precision": ("", "--precision bf16", lambda before, after: (
        torch.bfloat16 in after.types and torch.bfloat16 not in before.types)),
    "--compile": ("", "--compile on", lambda before, after: COMPILES(before, after) and sides(before) != sides(after)),
    "--device": ("", "--device cuda", lambda before, after: (
        after.starts[0].is_cuda if torch.cuda.is_available() else NO_CUDA in after.error)),
}


@pytest.mark.parametrize("flag", BENCH)
def test_bench(flag, turn, monkeypatch):
    monkeypatch.setattr(bench, "time_row", counting(bench.time_row))
    turn(benched, BENCH[flag])


# All of them. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parse_args", "argv", "rows"), [
    (train_cifar.parse_args, [], TRAIN), (eval_attacks.parse_args, ["--model-path", "m.pt"], EVALUATION),
    (audit.parse_args, ["--model-path", "m.pt"], AUDIT), (bench.parse_args, [], BENCH),
    (reproduce.parse_args, [], REPRODUCE),
    (pseudo_label.parse_args, ["--model-path", "m.pt", "--images", "i.npz", "--output", "o.npz"], LABELS),
    (compare.parse_args, ["a.json", "b.json"], {}),
], ids=["train_cifar", "eval_attacks", "audit", "bench", "reproduce", "pseudo_label", "compare"])
def test_every_flag_has_a_row(parse_args, argv, rows, monkeypatch):
    parsers, real = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self) or real(self, *a))
    parse_args(argv)
    options = {option for action in parsers[0]._actions for option in action.option_strings}
    assert {option for option in options if option.startswith("--")} - {"--help"} == rows.keys()
