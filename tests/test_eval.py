"""The evaluation: its numbers against a loop written out, its JSON, its table and its errors."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails_in_one_line
from test_checkpoints import bad_files

import attacks
import checkpoints
import data
import eval_attacks
import models
import train_cifar

SMALL = ["--num-images", "24", "--precision", "fp32", "--compile", "off", "--num-steps", "3", "--cw-steps", "4"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_cifar.main(["--defense", "madry", "--dataset", "digits", "--epochs", "4", "--num-steps", "1",
                      "--epsilon", "0.01", "--precision", "fp32", "--out-dir", str(folder)])
    return folder / "best.pt"


def mask(row):
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["correct_mask"]), np.uint8))[: row["n"]].astype(bool)


def test_accuracies_equal_a_loop_written_out(model_path):
    """One image at a time, with torch's own losses and the textbook's form of PGD."""
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, "--attacks", "natural", "fgsm", "pgd", "cw",
                                "pgd-kl", "pgd-ls", "--alphas", "0.2", "1"])
    model, _ = checkpoints.load_model(model_path)
    test = data.load("digits", train=False)
    epsilon = float(data.EPSILON["digits"])

    def cw(z, y, _):
        other = torch.cat([z[0, : y[0]], z[0, y[0] + 1 :]]).max()
        return -torch.clamp(z[0, y[0]] - other + 50, min=0)

    objectives = {
        "FGSM": (lambda z, y, _: F.cross_entropy(z, y), 1, epsilon),
        "PGD-3": (lambda z, y, _: F.cross_entropy(z, y), 3, epsilon / 10),
        "CW-inf": (cw, 4, epsilon / 10),
        "PGD-3-KL": (lambda z, y, p: F.kl_div(z.log_softmax(1), p, reduction="sum"), 3, epsilon / 10),
        "PGD-3-LS 0.2": (lambda z, y, _: F.cross_entropy(z, y, label_smoothing=0.2 * 10 / 9), 3, epsilon / 10),
        "PGD-3-LS 1": (lambda z, y, _: -(z.log_softmax(1).sum() - z.log_softmax(1)[0, y[0]]) / 9, 3, epsilon / 10),
    }
    assert [row["name"] for row in result["attacks"]] == ["Natural", *objectives]
    assert len({row["correct"] for row in result["attacks"]}) > 3  # the attacks differ on this model
    for row in result["attacks"]:
        correct, x_advs = [], []
        for i in range(24):
            x, y = test.images[i : i + 1] / 255, test.labels[i : i + 1]
            x_adv = x
            if row["name"] in objectives:
                objective, steps, step = objectives[row["name"]]
                p = model(x).softmax(1).detach()
                if row["name"] != "FGSM":
                    x_adv = x + attacks.start_per_image("uniform", x, epsilon, torch.tensor([i]))
                    x_adv = x_adv.clamp(0, 1)
                for _ in range(steps):
                    x_adv.requires_grad_()
                    gradient = torch.autograd.grad(objective(model(x_adv), y, p), x_adv)[0]
                    x_adv = x_adv.detach() + step * gradient.sign()
                    x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
            correct.append((model(x_adv).argmax() == y).item())
            x_advs.append(x_adv)
        assert np.sum(mask(row) != correct) == 0, row["name"]
        assert row["correct"] == sum(correct) and row["accuracy"] == sum(correct) / 24
        if row["name"] in objectives:  # the images too, because many attacks have the same outcome
            with models.frozen(model):
                attack = eval_attacks.make_attack(model, row["params"])
                ours = attack(test.images[:24] / 255, test.labels[:24], torch.arange(24))
            assert ((ours - torch.cat(x_advs)).abs() < 1e-5).float().mean() > 0.995, row["name"]  # a sign may flip


def test_batch_size_does_not_alter_the_outcome(model_path):
    runs = [eval_attacks.main(["--model-path", str(model_path), *SMALL, "--batch-size", b]) for b in ("5", "24")]
    masks = [[row["correct_mask"] for row in run["attacks"]] for run in runs]
    assert masks[0] == masks[1]


def test_json_holds_what_the_reader_needs(model_path, tmp_path, capsys):
    argv = ["--model-path", str(model_path), *SMALL, "--json", str(tmp_path / "r.json")]
    eval_attacks.main(argv)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"]["arch"] == "wrn-10-1" and result["model"]["defense"] == "madry"
    assert result["model"]["sha256"] == checkpoints.sha256(model_path) and result["n"] == 24
    assert result["command"] == " ".join(["python", "eval_attacks.py", *argv])
    rows = {row["name"]: row for row in result["attacks"]}
    assert list(rows) == ["Natural", "FGSM", "PGD-3", "CW-inf"]
    assert rows["PGD-3"]["params"] == {"objective": "ce", "epsilon": "0.05", "step_size": "1/200", "num_steps": 3,
                                       "random_start": "uniform", "seed": 0}
    assert rows["CW-inf"]["params"]["kappa"] == 50 and rows["CW-inf"]["params"]["num_steps"] == 4
    for row in rows.values():
        assert mask(row).sum() == row["correct"] and row["n"] == 24
        assert f"{row['correct']}/24" in printed.replace(" ", "")


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for correct, n in ((0, 24), (24, 24), (5, 24), (5214, 10000)):
        expected = binomtest(correct, n).proportion_ci(method="wilson")
        assert eval_attacks.wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_papers_row_stands_under_its_settings():
    result = {"model": {"path": "m.pt", "arch": "wrn-34-10", "dataset": "cifar10", "defense": "mart", "spat_alpha": 0.3,
                        "epochs": 90, "seed": 1}, "n": 10, "epsilon": "8/255", "precision": "fp32",
              "attacks": [eval_attacks.outcome("Natural", {}, torch.tensor([True] * 8 + [False] * 2), 1.0)]}
    assert "Natural 81.93  FGSM 61.87  PGD-20 59.59  CW-inf 51.57" in eval_attacks.table(result)
    assert " 80.00%   49.02 - 94.33 " in eval_attacks.table(result)
    for change in (dict(spat_alpha=0.2), dict(dataset="cifar100"), dict(defense="madry")):
        assert "paper" not in eval_attacks.table(result | {"model": result["model"] | change})
    assert "paper" not in eval_attacks.table(result | {"epsilon": "4/255"})


def test_bad_flags(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (
        [], ["--model-path", "m.pt", "--attacks", "pgd-ls"], ["--model-path", "m.pt", "--alphas", "0.1"],
        ["--model-path", model_path, "--num-images", "401"], ["--model-path", model_path, "--num-images", "0"],
        ["--model-path", model_path, "--epsilon", "8"], ["--model-path", model_path, "--attacks", "deepfool"],
        ["--model-path", model_path, "--attacks", "pgd-kl", "--random-start", "none"],
        ["--model-path", model_path, "--json", "no/such/folder.json"],
        ["--model-path", model_path, "--arch", "wrn-16-2"], ["--model-path", model_path, "--seed=-1"],
        ["--model-path", model_path, "--dataset", "nowhere"],
    ):
        fails_in_one_line(eval_attacks.main, argv, capsys)
    assert not list(tmp_path.iterdir())


def test_bad_model_files(tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        assert message in fails_in_one_line(eval_attacks.main, ["--model-path", tmp_path / name], capsys)


def test_a_model_with_another_number_of_classes_than_the_data(tmp_path, capsys):
    torch.save(models.build_model("wrn-10-1", 7).state_dict(), tmp_path / "m.pt")
    argv = ["--model-path", tmp_path / "m.pt", "--dataset", "digits"]
    assert "7 classes, digits has 10" in fails_in_one_line(eval_attacks.main, argv, capsys)


def test_evaluation_defaults_are_the_papers(model_path):
    _, args = eval_attacks.parse_args(["--model-path", "m.pt", "--epsilon", "8/255"])
    rows = eval_attacks.attack_list(args)
    assert [name for name, _ in rows] == ["Natural", "FGSM", "PGD-20", "CW-inf"]
    assert rows[2][1]["num_steps"] == 20 and Fraction(rows[2][1]["step_size"]) == Fraction(8, 2550)
    assert rows[3][1]["num_steps"] == 30 and rows[3][1]["kappa"] == 50 and rows[1][1]["random_start"] == "none"
