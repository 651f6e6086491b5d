"""Every `python` command of EXPERIMENTS.md and the README is accepted by its script; every training makes a step."""

import pathlib
import pickle
import re
import shlex
import subprocess
import tempfile

import numpy as np
import pytest
import torch

import audit
import bench
import compare
import data
import eval_attacks
import pseudo_label
import reproduce
import scores
import train_cifar

ROOT = pathlib.Path(__file__).parent.parent
PARSERS = {"eval_attacks.py": eval_attacks.parse_args, "audit.py": audit.parse_args, "bench.py": bench.parse_args,
           "train_cifar.py": train_cifar.parse_args,
           "compare.py": compare.parse_args, "pseudo_label.py": pseudo_label.parse_args,
           "reproduce.py": reproduce.parse_args}


def commands(path):
    """The lists of arguments with which a document calls `python`: what bash makes of its blocks (loops and variables
    included), where `python` prints and nothing else does anything; and the commands in its tables."""
    text = (ROOT / path).read_text()
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    shim = "python() { printf '%q ' \"$@\"; echo; }; pip() { :; }; pytest() { :; }; mkdir() { :; }; sbatch() { :; }\n"
    with tempfile.TemporaryDirectory() as folder:  # a redirection would write there
        done = subprocess.run(["bash", "-euc", shim + "PATH=\n" + script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    inline = re.findall(r"`python ([^`]+)`", text)
    return [argv for line in done.stdout.splitlines() + inline if (argv := shlex.split(line))[0] not in ("-", "-c")]


ALL = commands("EXPERIMENTS.md") + commands("README.md")
TRAINING = [argv[1:] for argv in commands("EXPERIMENTS.md") if argv[0] == "train_cifar.py"]


@pytest.mark.parametrize("argv", ALL, ids=" ".join)
def test_a_command_parses(argv):
    script, *flags = argv
    parsed = PARSERS[script](flags)
    if script == "train_cifar.py" and "--resume" not in flags:
        train_cifar.with_defaults(parsed[1])


def test_table_3_is_complete_and_has_the_papers_numbers():
    rows = dict(re.findall(r"^\| CIFAR[^|]+\| `python train_cifar.py ([^`]+)` \| ([\d./ ]+) \|",
                           (ROOT / "EXPERIMENTS.md").read_text(), re.M))
    found = {}
    for command, numbers in rows.items():
        args = train_cifar.with_defaults(train_cifar.parse_args(command.split())[1])
        assert (args.arch, args.epochs, args.epsilon) == ("wrn-34-10", 90, "8/255")
        found[args.dataset, args.defense, args.spat_alpha] = tuple(map(float, numbers.split(" / ")))
    assert found == scores.TABLE_3


@pytest.mark.parametrize("defense, expected", [
    ("madry", dict(weight_decay=2e-4, beta=None)), ("trades", dict(weight_decay=2e-4, beta=6.0)),
    ("mart", dict(weight_decay=7e-4, beta=5.0)), ("standard", dict(weight_decay=7e-4)),
])
def test_cifar100_trains_at_its_own_defaults(defense, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", made_data(100))
    run_one_step(["--dataset", "cifar100", "--defense", defense, "--arch", "wrn-10-1", "--precision", "fp32"], tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {key: state["args"][key] for key in expected} == expected
    assert state["args"]["dataset"] == "cifar100" and len(state["classes"]) == 100
    assert max(len(v) for k, v in state["state_dict"].items() if v.ndim == 2) == 100


def made_data(num_classes):
    """data.load's stand-in: four random images."""
    def load(name, data_dir="data", train=True):
        g = torch.Generator().manual_seed(0)
        images = torch.randint(256, (4, 3, 32, 32), generator=g, dtype=torch.uint8)
        labels = torch.randint(num_classes, (4,), generator=g)
        return data.Dataset(images.contiguous(memory_format=torch.channels_last), labels,
                            [str(k) for k in range(num_classes)])
    return load


def run_one_step(argv, folder):
    train_cifar.main([*argv, "--epochs", "1", "--limit-train", "4", "--val-size", "0", "--batch-size", "4",
                      "--compile", "off", "--out-dir", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("argv", TRAINING, ids=" ".join)
def test_one_step_of_every_training_command(argv, tmp_path, monkeypatch):
    """With its own architecture and flags, on four made images; what it leaves is evaluated."""
    args = train_cifar.with_defaults(train_cifar.parse_args(argv)[1])
    monkeypatch.setattr(data, "load", made_data(100 if args.dataset == "cifar100" else 10))
    monkeypatch.chdir(tmp_path)
    if args.aux_data:
        made = data.load(args.dataset)
        path = pathlib.Path(args.aux_data)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"data": made.images.permute(0, 2, 3, 1).numpy(), "extrapolated_targets": made.labels.numpy()}
        with open(path, "wb") as file:
            pickle.dump(arrays, file) if path.suffix == ".pickle" else np.savez(file, **arrays)
    run_one_step(argv, tmp_path / "run")
    result = eval_attacks.main(["--model-path", str(tmp_path / "run/last.pt"), "--attacks", "natural", "fgsm"])
    assert result["model"]["arch"] == args.arch and result["model"]["spat_alpha"] == args.spat_alpha
    (tmp_path / "run/last.pt").unlink()  # 360 MB of a WRN-34-10
    (tmp_path / "run/last.prev.pt").unlink(missing_ok=True)
