"""EXPERIMENTS.md and the README: every `python` command is accepted by its script, every training makes a step, every
link leads somewhere. What reproduce.py runs: test_reproduce.py."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import torch

import audit
import bench
import compare
import data
import eval_attacks
import models
import pseudo_label
import reproduce
import train_cifar

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text() for name in (
    "EXPERIMENTS.md", "README.md", "docs/departures.md", "docs/guarantees.md")}
PARSERS = {"eval_attacks.py": eval_attacks.parse_args, "audit.py": audit.parse_args, "bench.py": bench.parse_args,
           "train_cifar.py": train_cifar.parse_args, "compare.py": compare.parse_args,
           "pseudo_label.py": pseudo_label.parse_args, "reproduce.py": reproduce.parse_args}
ALL = [shlex.split(line) for text in TEXTS.values() for line in re.findall(r"\bpython (\w+\.py[^`\n&#]*)", text)]
TRAINING = [argv[1:] for argv in ALL if argv[0] == "train_cifar.py" and not {"--resume", "digits"} & set(argv)]


@pytest.mark.parametrize("argv", ALL, ids=" ".join)
def test_a_command_parses(argv):
    script, *flags = argv
    parsed = PARSERS[script](flags)
    if script == "train_cifar.py" and "--resume" not in flags:
        train_cifar.with_defaults(parsed[1])


def anchor(heading):
    """What GitHub makes of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def text_of_notebook(path):
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


@pytest.mark.parametrize("name", [*TEXTS, *(f"notebooks/{path.name}" for path in ROOT.glob("notebooks/*.ipynb"))])
def test_every_link_leads_somewhere(name):
    anchors = {ROOT / path: list(map(anchor, re.findall(r"^#+ (.*)$", text, re.M))) for path, text in TEXTS.items()}
    text = TEXTS[name] if name in TEXTS else text_of_notebook(ROOT / name)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) > 5 or "/" in name
    for path, _, heading in (link.partition("#") for link in links):
        place = ((ROOT / name).parent / path if path else ROOT / name).resolve()
        assert place.exists(), path
        assert not heading or heading in anchors[place], heading


def test_the_python_of_the_readme_runs(monkeypatch):
    """The training loop, one step of it moves the weights; and the loading of a model."""
    loop, load = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], re.M | re.S)
    model = models.build_model("wrn-10-1")
    before, x, y = [p.clone() for p in model.parameters()], torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    exec(loop, {"loader": [(x, y)], "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)})
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model.training
    monkeypatch.chdir(ROOT)
    found = {}
    exec(load, found)
    assert found["model"](x).shape == (2, 10) and found["info"]["args"]["defense"] == "madry"


def test_the_papers_numbers_for_cifar100():
    table = re.search(r"^\| paper \| (6.*?) \|  \|$", TEXTS["EXPERIMENTS.md"], re.M)[1]
    found = [tuple(map(float, cell.split(" / "))) for cell in table.split(" | ")]
    assert found == [tuple(values.values()) for (target, _), values in reproduce.PAPER.items()
                     if target == "table3-cifar100"]


@pytest.mark.parametrize("defense, expected", [
    ("madry", dict(weight_decay=2e-4, beta=None)), ("trades", dict(weight_decay=2e-4, beta=6.0)),
    ("mart", dict(weight_decay=7e-4, beta=5.0)), ("standard", dict(weight_decay=7e-4)),
])
def test_cifar100_has_its_own_defaults(defense, expected):
    argv = ["--dataset", "cifar100", "--defense", defense]
    args = vars(train_cifar.with_defaults(train_cifar.parse_args(argv)[1]))
    assert {key: args[key] for key in expected} == expected


def test_cifar100_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", made_data(100))
    run_one_step(["--dataset", "cifar100", "--defense", "mart", "--arch", "wrn-10-1", "--precision", "fp32"], tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
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
    monkeypatch.setattr(data, "load", made_data(10))
    monkeypatch.chdir(tmp_path)
    if args.aux_data:
        made = data.load(args.dataset)
        np.savez(args.aux_data, data=made.images.permute(0, 2, 3, 1).numpy(), extrapolated_targets=made.labels.numpy())
    run_one_step(argv, tmp_path / "run")
    result = eval_attacks.main(["--model-path", str(tmp_path / "run/last.pt"), "--attacks", "natural", "fgsm"])
    assert result["model"]["arch"] == args.arch and result["model"]["spat_alpha"] == args.spat_alpha
    (tmp_path / "run/last.pt").unlink()  # 360 MB of a WRN-34-10
    (tmp_path / "run/last.prev.pt").unlink(missing_ok=True)
